"""Notations of numbers and formulas in answers and prose: signs, Markdown, LaTeX, currency.

unwrapped("**$5$**")                     # "5"
plain_notation(r"3 \\cdot \\frac{1}{2}")   # "3 * ((1)/(2))"
"""

from __future__ import annotations

import re

INVISIBLE = "\u200b\u200e\u200f\u2060\u2066\u2067\u2068\u2069\ufeff"  # copied with text of web pages
MINUS = str.maketrans("−–‐‑－", "-----", INVISIBLE)
SIGNS = str.maketrans("×·⋅∗÷∕⁄", "****///") | MINUS
# 1{,}234  1,\!234  1\,234, and 1 234 with a space that does not break the line
THOUSANDS = re.compile(r"\{,\}|,\\!|(?<=[0-9])(?:\\,|[\u00a0\u2009\u202f])(?=[0-9]{3}(?![0-9]))")
_FONTS = "boxed|fbox|mbox|text|textbf|textit|textrm|mathbf|mathrm|mathit|mathsf|boldsymbol|ensuremath"
_LAYERS = (
    r"\*{1,3}([^*]+)\*{1,3}",
    r"_{1,3}([^_]+)_{1,3}",
    r"```\w*\n([^`]+)```|`{1,3}([^`]+)`{1,3}",
    r"\"([^\"]+)\"|'([^']+)'|“([^”]+)”",
    r"\$\$?((?:[^$\\]|\\.)+)\$\$?",
    r"\\{1,2}\(((?:(?!\\\)).)+?)\\{1,2}\)",  # \(5\), also escaped twice
    r"\\{1,2}\[((?:(?!\\\]).)+?)\\{1,2}\]",
    r"\\begin\{(?:equation|align|gather|displaymath|math)\*?\}((?:(?!\\end).)+)\\end\{\w+\*?\}",
    rf"\\(?:{_FONTS})\s*\{{((?:[^{{}}]|\{{(?:[^{{}}]|\{{[^{{}}]*\}})*\}})+)\}}",
)
_WRAPPED = re.compile("|".join(_LAYERS), re.DOTALL)
_STYLE = re.compile(r"\\(?:display|text)style(?![A-Za-z])\s*")


def unwrapped(text: str) -> str:
    """An answer without up to four layers of Markdown or LaTeX around all of it, and without a full stop there."""
    for _ in range(4):
        text = _STYLE.sub("", text).strip()
        match = _WRAPPED.fullmatch(text.removesuffix("."))
        if match is None:
            break
        text = match[match.lastindex or 0]
    return text.strip()


_FRACTIONS = re.compile(r"\\[dtc]?frac\s*(?:\{([^{}]*)\}\s*\{([^{}]*)\}|([0-9])\s*([0-9]))")
_NOTATION = [(re.compile(pattern), plain) for pattern, plain in (
    (r"\\\\", "\n"),  # the end of a line of LaTeX
    (r"\\(?:times|cdot|ast)(?![A-Za-z])", "*"),
    (r"\\div(?![A-Za-z])", "/"),
    (r"\\(?:left|right)(?![A-Za-z])|\\!", ""),
    (r"\\[,;: ]|\\q?quad(?![A-Za-z])|[&~]", " "),
    (r"\\(?:text|mathrm|boxed)\s*\{([^{}]*)\}", r" \1 "),
    (r"\\[(\[]", "["),  # math begins
    (r"\\[)\]]", "]"),  # math ends
)]  # fmt: skip
_CURRENCY = re.compile(r"\\?[$€£](?=\s*[-0-9(])")  # also the `$` that begins math
_PLAIN = re.compile(r"(?:[\w\s\0+/()=.,:;?!-]|\*(?!\*))*")
_BOLD = re.compile(r"(?<![\w)])\*\*(?=\S)|(?<=\S)\*\*(?![\w(])")


def plain_notation(cell: str) -> str:
    """A cell of an equality with the signs + - * / and without LaTeX, currency and bold type."""
    if _PLAIN.fullmatch(cell):  # fast
        return cell
    cell = THOUSANDS.sub(",", cell).translate(SIGNS)
    if "\\" in cell or "&" in cell:
        for _ in range(3):  # fractions of fractions, from the inside
            cell = _FRACTIONS.sub(lambda m: f"(({m[1] or m[3]})/({m[2] or m[4]}))", cell)
        for pattern, plain in _NOTATION:
            cell = pattern.sub(plain, cell)
    return _BOLD.sub("", _CURRENCY.sub("", cell))
