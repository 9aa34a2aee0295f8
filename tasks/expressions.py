"""Arithmetic in sampled text: a small parser reads it, Python never runs it.

GRPO-Zero checks the characters of an answer and then calls `eval`, so an answer such as `9**9**9` stops the trainer.
Here a recursive-descent parser knows + - * / and parentheses over plain ASCII integers, computes exact fractions, and
refuses long or deeply nested text.

    evaluate_expression("(3 + 5) * 2")    # (Fraction(16), [3, 5, 2])
    plain_number(" 1,234 ")               # Fraction(1234)
    false_sums("3 + 5 = 9")               # (1, 1)

Grammar (white space may stand between any two tokens):

    sum     := product (("+" | "-") product)*
    product := factor (("*" | "/") factor)*
    factor  := ["-"] (integer | "(" sum ")")

One minus sign in front of a number or a parenthesis is allowed. `--3`, `+3`, `**`, `//`, `1_000`, `007`, decimals, an
equals sign, and digits or operators of other scripts are not. `plain_number` and `false_sums` read more notations: they
judge numbers and sums that a model writes in its own style.
"""

from __future__ import annotations

import functools
import re
from fractions import Fraction

from tasks.notation import SIGNS, THOUSANDS, plain_notation, unwrapped

MAX_CHARS = 200  # an answer with six numbers has about 40
MAX_DEPTH = 20  # of parentheses
MAX_SUMS = 100  # `false_sums` looks at the first 100 equals signs, so its time is bounded
SUM_WINDOW = 100  # ... and at 100 characters on either side of each

_SPACES = " \t\r\n"
_TOKEN = re.compile(r"[ \t\r\n]*(?:([0-9]+)|([-+*/()]))")  # [0-9]: \d also matches the digits of other scripts


class ExpressionError(ValueError):
    """The text is no arithmetic expression, has no value, or is too long or deep to be an honest one."""


def evaluate_expression(text: str) -> tuple[Fraction, list[int]]:
    """Exact value of an expression and the numbers it uses, in order of appearance.

    Raises ExpressionError for anything outside the grammar above, for a division by zero, for more than MAX_CHARS
    characters and for more than MAX_DEPTH open parentheses.
    """
    if len(text) > MAX_CHARS:
        raise ExpressionError(f"expression of {len(text)} characters, at most {MAX_CHARS} are read")
    parser = _Parser(_tokenize(text))
    value = parser.sum(depth=0)
    if parser.tokens:
        raise ExpressionError(f"unexpected {parser.tokens[-1]!r} after a complete expression")
    return value, parser.numbers


def _tokenize(text: str) -> list[str]:
    tokens, position, end = [], 0, len(text.rstrip(_SPACES))
    while position < end:
        match = _TOKEN.match(text, position)
        if match is None:
            raise ExpressionError(f"unexpected character {text[position:].lstrip(_SPACES)[0]!r}")
        token = match[1] or match[2]
        if len(token) > 1 and token[0] == "0":
            raise ExpressionError(f"leading zero in {token!r}")
        tokens.append(token)
        position = match.end()
    return tokens


class _Parser:
    """Recursive descent, one method for each line of the grammar."""

    def __init__(self, tokens: list[str]):
        self.tokens = tokens[::-1]  # the next token is the last one, so that taking it is a pop
        self.numbers: list[int] = []

    def take(self, *wanted: str) -> str | None:
        return self.tokens.pop() if self.tokens and self.tokens[-1] in wanted else None

    def sum(self, depth: int) -> Fraction:
        value = self.product(depth)
        while operator := self.take("+", "-"):
            term = self.product(depth)
            value = value + term if operator == "+" else value - term
        return value

    def product(self, depth: int) -> Fraction:
        value = self.factor(depth)
        while operator := self.take("*", "/"):
            factor = self.factor(depth)
            if operator == "/" and factor == 0:
                raise ExpressionError("division by zero")
            value = value * factor if operator == "*" else value / factor
        return value

    def factor(self, depth: int) -> Fraction:
        sign = -1 if self.take("-") else 1
        if self.take("("):
            if depth == MAX_DEPTH:
                raise ExpressionError(f"parentheses nested deeper than {MAX_DEPTH}")
            value = self.sum(depth + 1)
            if not self.take(")"):
                raise ExpressionError("a parenthesis is not closed")
            return sign * value
        if not self.tokens or not self.tokens[-1].isdigit():
            raise ExpressionError(f"a number is missing before {self.tokens[-1] if self.tokens else 'the end'!r}")
        self.numbers.append(int(self.tokens.pop()))
        return Fraction(sign * self.numbers[-1])


_FRACTION = re.compile(r"([-+]?)\s*\\[dtc]?frac\s*(?:\{\s*([-+]?[0-9 ]+)\}\s*\{([0-9 ]+)\}|([0-9])([0-9]))")
_NUMBER = re.compile(
    r"(?P<sign>[-+]?)\s*(?:\\?[$€£¥₹]\s*(?P<inner>[-+]?))?"
    r"(?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE](?P<exponent>[-+]?[0-9]{1,3}))?"
    r"(?:\s*/\s*(?P<divisor>[0-9]+))?(?:\s*\\?[$€£¥₹])?\.?"
)


def plain_number(text: str) -> Fraction | None:
    """The value of a text that is one number: `42`, `-7`, `+7`, `.5`, `1,234`, `7/2`, `1e-05`, `-$5`, `**5**`, `$5$`.

    A currency sign, a full stop, Markdown and LaTeX around the number are removed, because word problems are answered
    that way. Returns None for every other text, also for `6 * 7` and `42 apples`.
    """
    text = THOUSANDS.sub(",", text).translate(SIGNS).strip() if len(text) <= 1000 else ""
    if len(text) > 100:
        return None
    text = unwrapped(text)
    if match := _FRACTION.fullmatch(text):
        sign, *parts = (part for part in match.groups() if part is not None)
        text = sign + "/".join(part.strip() for part in parts)
    match = _NUMBER.fullmatch(text)
    if match is None or (match["sign"] and match["inner"]) or (match["divisor"] and int(match["divisor"]) == 0):
        return None
    value = Fraction(match["digits"].replace(",", "")) * Fraction(10) ** int(match["exponent"] or 0)
    value /= int(match["divisor"] or 1)
    return -value if "-" in (match["sign"], match["inner"]) else value


# --- equalities in prose

_LIST_MARKER = re.compile(r"\n\s*(?:(?:[-+*•]|[0-9A-Za-z]{1,3}[.)]|\([0-9A-Za-z]{1,3}\)(?!\s*[-+*/(]))\s+)*")
_DASH = re.compile(r"\n\s*-\s+")
_ENDS, _OPERATORS = set("0123456789)"), set("-+*/×÷·−")
_PIECE = re.compile(
    r"(?P<number>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,]*[0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?)|(?P<sign>[-+*/()])"
    r"|(?P<space>[ \t\r]+)|(?P<word>[^\W\d_]{2,})|(?P<other>.)", re.DOTALL
)  # fmt: skip
# Words beside an expression that can belong to it: "5 times 3 + 2 = 17", "7 / 2 = 3 remainder 1", "30 + 30 = 1 hour".
_ARITHMETIC_WORD = re.compile(
    "times|plus|minus|over|of|by|than|from|divided|multiplied|squared|cubed|to|power|mod|modulo|base|percent|remainder"
    "|rem|pi|sqrt|root|sin|cos|tan|log|ln|exp|abs|max|min|factorial|choose|twice|double|triple|hundred|thousand|million"
    "|billion|mil|bn|ones|tens|(?:twen|thir|for|fif|six|seven|eigh|nine)ty|(?:half|halve|third|quarter|fourth|fifth|sixth|eighth|tenth|hundredth|thousandth|dozen|pair|score"
    "|second|sec|minute|min|hour|hr|day|week|month|year|cent|dollar|euro|pound|penny|pennie|dime|nickel|inche|yard|mile"
    "|metre|meter|gram|ounce|litre|liter|pint|gallon|ton|am|pm|mm|cm|km|mg|kg|ml|ft|lb|oz)s?|inch|foot|feet"
    "|mal|durch|geteilt|und|fois|sur|moins|et|por|entre|mas|menos|veces|per|diviso|meno|vezes|mais",
    re.IGNORECASE,
)
_LETTER_OPERATORS = set("xXхХvVcCpPrReEhHmMsSdDkK")  # 3 x 5, 5 C 2, 7 R 1, 3 e 5, 2 h 30; х is Cyrillic
_CONTRACTED = re.compile(r"[^\W\d_]{2,}['’]$")  # that's 3 + 5
# Emoji, but not 100, $, 10 and the clocks.
_EMOJI = re.compile("[\U0001f300-\U0001faff](?<![\U0001f4af\U0001f4b2\U0001f51f\U0001f550-\U0001f567])")
_ARROW_COMMAND = re.compile(r"\\(?:implies|iff|to|therefore|because|(?:Long|long)?[Rr]ightarrow)$")
_BEFORE, _BEFORE_A_SPACE, _OPENING_QUOTE = set("=\n[{<>→⇒—"), set(".,:;?!#"), set("|\"'“‘`")
_BEHIND, _BEHIND_UNLESS_DIGITS = set("=\n)]}<>|`$→⇒—✓✔✅✗❌?;"), set(".,:\"'”’")
_SHORT_WORD = re.compile(r"[aI]\s+[A-Za-z]{2}")  # 8 I think
_GOES_ON = re.compile(r"\s*(?:[*/^]|[-+]\s*(?:[0-9(]|\w\b))")
# "3, remainder 1", "10 in base 8". Only if the left side is no whole number: "3 with 1 left", "3 each, 1 is left over".
_REMAINDER = re.compile(r"(?:\W*\w+){0,2}\W*\b(?:remainders?|rem|base|mod|modulo)\b", re.IGNORECASE)
_REST = re.compile(r"[^.]{0,40}?\b(?:left|leftover|remain(?:s|ing)?|over|rest|remainder)\b", re.IGNORECASE)
_TWO_RUNS = re.compile(
    r"=\s*(-?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?)(?:(,)|\s+)(?=[0-9(])(([0-9]*)[^=]*[-+*/][^=]*=?)",
    re.DOTALL,
)
_AND_A_FRACTION = re.compile(r"and\s+(?:an?\b|one\b|half\b|[0-9]+\s*/\s*[0-9]+\s*(?![\s0-9/*+=-]))")


def false_sums(text: str) -> tuple[int, int]:
    """Equalities in `text`: (number of wrong ones, number of all that can be judged).

    An equality is an expression with an operator, an equals sign and a number or a second expression, on one line:
    `3 + 5 = 8`, `(44 - 19) * 2 = 50`, `1,450 − 350 = 1,100`, `\\frac{7}{2} = 3.5`. A decimal is right if it is the left
    side rounded to the digits shown. An equality is counted only if neither neighbour can continue it: in
    `3 x 5 + 2 = 17`, `2x + 3 = 7`, `50% + 2 = 3` and `7 / 2 = 3 1/2` nothing is judged, because a part of the text is
    not read. `!=`, `==` and decimals on the left are not counted either. Only the first MAX_SUMS equals signs are read.
    """
    wrong = total = 0
    equals = text.find("=")
    for _ in range(MAX_SUMS):
        if equals < 0:
            break
        correct = _is_right(_cell_before(text, equals), _cell_behind(text, equals))
        total += correct is not None
        wrong += correct is False
        equals = text.find("=", equals + 1)
    return wrong, total


@functools.lru_cache(maxsize=4096)  # responses of a group repeat each other, and reward and diagnostics both ask
def _is_right(before: str, behind: str) -> bool | None:
    """Whether the equality between two cells holds in one of its readings. None: one is not clear."""
    cells = _readings(before + "=", last=True)
    if dash := _DASH.match(cells[0]):
        cells.append("\n-" + cells[0][dash.end() :])  # "- 5 + 3": a list marker or a minus sign
    lefts = [_value_before(cell) for cell in cells]
    if set(lefts) == {None}:
        return None
    rights = _readings("=" + behind, last=False)
    verdicts = [None if left is None else _value_behind_is(cell, left) for left in lefts for cell in rights]
    return True if True in verdicts else None if None in verdicts else False


def _cell_before(text: str, equals: int) -> str:
    """The text between the previous equals sign or line break, which is included, and this equals sign, excluded."""
    low = max(0, equals - SUM_WINDOW)
    start = max(text.rfind("=", low, equals), text.rfind("\n", low, equals))
    if start < 0:
        return ("\n" if low == 0 else "\0") + text[low:equals]  # \0: the cell is longer than the window
    line_before = text[max(low, text.rfind("\n", low, start) + 1) : start]
    continues = text[start] == "\n" and _is_continued(line_before, text[start + 1 : equals])
    return ("\0" if continues else text[start]) + text[start + 1 : equals]


def _is_continued(line: str, next_line: str) -> bool:
    """Whether an expression may go on from one line to the next: an operator ends the first or begins the second."""
    if re.search(r"[0-9)]\s*[-+*/×÷·−]\s*$", line):
        return True
    return "=" not in line and line.rstrip()[-1:] in _ENDS and next_line.lstrip()[:1] in _OPERATORS


def _cell_behind(text: str, equals: int) -> str:
    """The text behind an equals sign, up to and including the next equals sign or line break."""
    window = text[equals + 1 : equals + 1 + SUM_WINDOW]
    match = re.search(r"[=\n]", window)
    if match:
        return window[: match.end()]
    return window + ("\n" if equals + 1 + SUM_WINDOW >= len(text) else "\0")


def _value_before(cell: str) -> Fraction | None:
    """Value of the expression at the end of a cell. None: there is none, or its left end is not clear."""
    if cell[0] == "\n":
        cell = _LIST_MARKER.sub("\n", cell, count=1)
    end = max(piece.end() for piece in _PIECE.finditer(cell) if piece.lastgroup in ("word", "other"))
    run = cell[end:]
    opening = _unmatched_opening(run)
    if opening is not None:  # "(3 + 5 = 8)": the equality stands inside
        run = run[opening + 1 :]
    elif not _may_begin(cell[:end], run):
        return None
    try:
        value, numbers = evaluate_expression(run.replace(",", ""))
    except ExpressionError:
        return None
    return value if len(numbers) > 1 else None


def _may_begin(before: str, run: str) -> bool:
    """Whether an expression begins with `run`. False: the text `before` may belong to it."""
    neighbour = re.findall(r"[^\W\d_]{2,}$|.$", before, re.DOTALL)[0]  # a word or one character
    earlier, spaced, sign = before.removesuffix(neighbour), run[:1].isspace(), run.lstrip()[:2]
    if len(neighbour) > 1 and earlier[-1:] == "\\":
        return _ARROW_COMMAND.search(before) is not None  # not \bullet
    if len(neighbour) > 1:
        after_number = neighbour == "and" and earlier.rstrip()[-1:].isdigit()
        mixed = after_number and _starts_with_proper_fraction(run)  # 3 and 1/2 + 1
        return spaced and sign[:1] != "-" and not mixed and not _is_arithmetic(neighbour, earlier)
    if sign[:1] == "-" and (sign != sign.strip() or spaced) and neighbour != "=":
        return False  # "$x$ - 3 + 5"
    if neighbour.isalpha():
        alone = earlier[-1:].isspace() and neighbour.isascii() and neighbour not in _LETTER_OPERATORS
        return spaced and sign[:1] != "(" and (alone or _CONTRACTED.search(earlier) is not None)
    if _EMOJI.match(neighbour):
        return spaced
    if neighbour in ":!" and (earlier[-1:].isspace() or (neighbour == "!" and earlier[-1:].isdigit())):
        return False  # 6 : 2 + 1, 3! 5
    if neighbour in _OPENING_QUOTE:
        return (not earlier or earlier[-1].isspace()) and (neighbour == "|" or not spaced)  # not f'(3) + 2, 5 ' 3 + 2
    return neighbour in _BEFORE or (neighbour in _BEFORE_A_SPACE and spaced)


def _is_arithmetic(word: str, earlier: str) -> bool:
    """Whether a word can be part of a sum: arithmetic, a unit, or a word of another script behind a number."""
    return _ARITHMETIC_WORD.fullmatch(word) is not None or (not word.isascii() and earlier.rstrip()[-1:].isdigit())


def _value_behind_is(cell: str, left: Fraction) -> bool | None:
    """Whether the expression at the begin of a cell has the value `left`. None: no clear expression stands there."""
    end = next(piece.start() for piece in _PIECE.finditer(cell) if piece.lastgroup in ("word", "other"))
    run, behind = cell[:end], cell[end:]
    closing = _unmatched_closing(run)
    if closing is not None:
        run, behind = run[:closing], ")"
    elif behind[:2].isalpha():
        run = re.sub(r"\s+[-(]\s*$", " ", run)  # "8 - so", "8 (that is"
    if not _may_end(run, behind) or _REMAINDER.match(cell, end) or (left.denominator > 1 and _REST.match(cell, end)):
        return None
    number = run.strip().replace(",", "")
    if re.fullmatch(r"-?[0-9]+\.[0-9]+", number):
        return abs(Fraction(number) - left) * 2 * 10 ** len(number.partition(".")[2]) <= 1
    try:
        return evaluate_expression(number)[0] == left
    except ExpressionError:
        return None


def _may_end(run: str, behind: str) -> bool:
    """Whether an expression ends with `run`. False: the text `behind` may belong to it."""
    if behind[:2].isalpha():
        word = re.split(r"[\W\d_]", behind, maxsplit=1)[0]
        mixed = run.strip().isdigit() and _AND_A_FRACTION.match(behind)
        mixed = mixed or _GOES_ON.match(behind, len(word))  # 8 apples + 2
        return run[-1:].isspace() and not mixed and not _is_arithmetic(word, run)
    if _EMOJI.match(behind) or _SHORT_WORD.match(behind):
        return run[-1:].isspace() and not _GOES_ON.match(behind, 1)
    if behind[0] in _BEHIND:
        return True
    ratio = behind[0] == ":" and run[-1:].isspace()
    decimal = behind[1:2].isdigit() or (behind[0] == "." and behind[1:2] in ".(\\")  # 3.(3)
    return behind[0] in _BEHIND_UNLESS_DIGITS and not decimal and not ratio


def _readings(cell: str, last: bool) -> list[str]:
    """A cell in plain notation, without the equals sign beside it, in all its readings.

    One equality may end and the next begin without a word between them: "= 8 8 + 1 =" and "= 21,21+5 =" are two runs,
    of which the `last` or the first is wanted. "= 100,100-3 =" may also be a number above a thousand, "= 3,5 * 2" a
    decimal.
    """
    cell = plain_notation(cell)
    match = _TWO_RUNS.fullmatch(cell)
    if match is None or _starts_with_proper_fraction(match[3]) or not (match[2] or cell.endswith("=")):  # 3 1/2, 1 450
        return [cell[:-1] if last else cell[1:]]
    head, comma, rest, digits = match.groups()
    runs = ["=" + rest[:-1] if last else head + "="]
    if len(digits) == 3:
        runs.append(f"={head},{rest[:-1]}" if last else f"{head},{rest}")
    elif comma and digits and head.isdigit():
        decimal = f"({int(head + digits)}/{10 ** len(digits)}){rest[len(digits) :]}"
        runs.append("=" + decimal[:-1] if last else decimal)
    return runs


def _starts_with_proper_fraction(text: str) -> bool:
    match = re.match(r"\s*([0-9]+)\s*/\s*([0-9]+)", text)
    return match is not None and int(match[1]) < int(match[2])


def _unmatched_opening(run: str) -> int | None:
    """Position of the last "(" that is not closed."""
    depth = 0
    for position in reversed(range(len(run))):
        depth += (run[position] == ")") - (run[position] == "(")
        if depth < 0:
            return position
    return None


def _unmatched_closing(run: str) -> int | None:
    """Position of the first ")" that was not opened."""
    depth = 0
    for position, character in enumerate(run):
        depth += (character == "(") - (character == ")")
        if depth < 0:
            return position
    return None
