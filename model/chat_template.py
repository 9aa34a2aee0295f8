"""Chat templates: a stranger's Jinja program turns messages into a prompt, inside walls and on a budget.

The rules are those of transformers: jinja2's immutable sandbox, `trim_blocks` and `lstrip_blocks`, loop controls, the
`{% generation %}` tag, `raise_exception`, `strftime_now`, and a `tojson` that leaves HTML and letters alone, so that a
template gives the same text here as there.

Where this departs from transformers: a sandbox keeps a program from reaching out, not from running forever. Three
nested `range(100000)` loops or `"a" * 10**9` are legal Jinja. Here every rendering has one budget (`MAX_WORK`): a unit
for each node of a loop body at each round, for each item, and for every 16 characters of each value that is made or
looked through. Whatever makes much out of little (`*`, `replace`, `join`, ...) pays *before* it runs, so neither time
nor memory runs away; no threads, no signals. For this the syntax tree is rewritten once, after parsing (`_Meter`), and
only filters and methods whose cost is known are offered; others (`center`, `str.format`, ...) are refused by name.

    template = ChatTemplate(source)                 # ValueError: too long, or not Jinja
    prompt   = template.render(messages=[...])      # ValueError: the template fails, refuses, or exceeds the budget

One template renders one prompt at a time (the budget is a counter in it): give each thread its own.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.filters import make_attrgetter
from jinja2.runtime import LoopContext, TemplateReference
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Cycler, Namespace
from jinja2.visitor import NodeTransformer

MAX_SOURCE = 100_000  # characters of template; the longest that ship with released models have about 20,000
MAX_WORK = 4_000_000  # units a rendering, seconds at the most; a thousand messages in Qwen's template: 0.2 million
MAX_PROMPT = 4_000_000  # characters of rendered prompt: about a million tokens
MAX_INT_BITS = 4096
CHARS_PER_UNIT = 16


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Filters that look at an item at a time: a string counts as a list of its characters.
ITEM_FILTERS = _names("first last list map max min reject rejectattr reverse select selectattr sort unique")
VALUE_FILTERS = _names(
    "abs capitalize count d default dictsort e escape float int items length lower safe string title trim upper"
)
METHODS = _names(
    "capitalize copy count endswith find fromkeys get index isalnum isalpha isdecimal isdigit islower isnumeric "
    "isspace istitle isupper items join keys lower lstrip partition removeprefix removesuffix replace rfind rindex "
    "rpartition rsplit rstrip split splitlines startswith strip title upper values"
)
_PLAIN_FORMAT = re.compile(r"(?:[^%]|%[sdr%])*")  # no widths: "%999999999d" is one gigabyte


class ChatTemplate:
    """A compiled chat template. `ValueError` where the source is too long or is not a Jinja template."""

    def __init__(self, source: str):
        if len(source) > MAX_SOURCE:
            raise ValueError(f"the chat template has {len(source)} characters; at most {MAX_SOURCE} are accepted")
        self._environment = _BoundedEnvironment()
        try:
            tree = _Meter().visit(self._environment.parse(source))
            self._template = self._environment.from_string(tree)
        except (
            Exception
        ) as error:  # SyntaxError, RecursionError, MemoryError, ...: of a stranger's source, all mean this
            raise ValueError(f"the chat template does not compile: {_one_line(error)}") from error

    def render(self, **variables: Any) -> str:
        """The prompt. Variables must be JSON data: the template never sees an object with methods of its own."""
        try:
            plain = json.loads(json.dumps(variables))
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"messages and template variables must be plain JSON data: {_one_line(error)}") from error
        self._environment.work_left = MAX_WORK
        try:
            text = self._template.render(plain)
        except Exception as error:  # a template may fail in any way; the way is told, and nothing else happens
            raise ValueError(f"the chat template failed: {_one_line(error)}") from error
        if len(text) > MAX_PROMPT:
            raise ValueError(f"the chat template rendered {len(text)} characters; at most {MAX_PROMPT} are accepted")
        return text


def _one_line(error: BaseException) -> str:
    """What went wrong, as one short line."""
    return f"{type(error).__name__}: {' '.join(str(error)[:1000].split())}"[:300].removesuffix(": ")


class _BoundedEnvironment(ImmutableSandboxedEnvironment):
    """transformers' environment, in which every operation that handles data pays for it first."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])  # the others cannot make a value larger than what they got

    def __init__(self):
        # optimized=False: no expression is worked out while compiling, where nothing would count it.
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[jinja2.ext.loopcontrols, _GenerationTag]
        )
        self.work_left = MAX_WORK
        self.finalize = _pay_for_output
        items = {name: self._metered(self.filters[name], by_item=True) for name in ITEM_FILTERS}
        values = {name: self._metered(self.filters[name]) for name in VALUE_FILTERS}
        self.filters = {**items, **values, "join": self._join, "replace": self._replace, "tojson": self._tojson}
        self.tests = {name: self._metered(test) for name, test in self.tests.items()}
        self.globals = {name: self.globals[name] for name in ("range", "cycler", "joiner")}
        self.globals |= {"namespace": _Namespace, "dict": _Dict(), "strftime_now": _strftime_now}
        self.globals["raise_exception"] = _raise_exception

    def spend(self, units: int) -> bool:
        """Pay `units`, or end the rendering. True, so that it can stand before an `and`."""
        self.work_left -= units
        if self.work_left < 0:
            raise SecurityError(f"it asks for more than the {MAX_WORK} units of work that a template may use")
        return True

    def charge(self, value: Any, by_item: bool = False) -> Any:
        """Pay for `value` and all inside it, as often as it is inside. An iterator comes back to pay as it is drawn."""
        if by_item and isinstance(value, str):
            self.spend(len(value))
        stack = [value]
        while stack:
            item = stack.pop()
            if isinstance(item, str):
                self.spend(1 + len(item) // CHARS_PER_UNIT)
            elif isinstance(item, range):
                self.spend(1 + len(item))
            elif isinstance(item, (list, tuple, dict, KeysView, ValuesView, ItemsView)):
                self.spend(1 + len(item))
                stack.extend(item)
                stack.extend(item.values() if isinstance(item, dict) else ())
            else:
                self.spend(1)
                if isinstance(item, int) and item.bit_length() > MAX_INT_BITS:
                    raise SecurityError(f"it makes an integer of more than {MAX_INT_BITS} bits")
        return map(self.charge, value) if isinstance(value, Iterator) and not isinstance(value, LoopContext) else value

    def concatenate(self, *parts: Any) -> str:
        """The operator `~`."""
        self.charge(parts)
        return "".join(map(str, parts))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """`+ * ** %`, after a look at how large the result will be."""
        if operator in ("+", "%"):
            self.charge((left, right))
        if operator == "%" and isinstance(left, str) and not _PLAIN_FORMAT.fullmatch(left):
            raise SecurityError("string formatting with % is offered for %s, %d, %r and %% only")
        if operator == "*":
            self._charge_product(left, right)
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            self.charge(left)
            if left.bit_length() * right > MAX_INT_BITS:
                raise SecurityError(f"it makes an integer of more than {MAX_INT_BITS} bits")
        return super().call_binop(context, operator, left, right)

    def _charge_product(self, left: Any, right: Any) -> None:
        """Text or a list times a number: the number of copies times the weight of one."""
        before = self.work_left
        self.charge((left, right))
        for value, times in ((left, right), (right, left)):
            if isinstance(value, (str, list, tuple)) and isinstance(times, int):
                self.spend(max(times, 0) * (before - self.work_left))

    def wrap_str_format(self, value: Any) -> Any:
        """`str.format` takes widths, as `%` does, and nests them; no released template needs it."""
        if super().wrap_str_format(value) is not None:
            raise SecurityError("str.format is not offered to chat templates; use ~ or +")

    def call(__self, __context: Any, __function: Any, *args: Any, **kwargs: Any) -> Any:
        """Every call in a template: macros, methods of data, globals. The names leave the template's keywords free."""
        owner = getattr(__function, "__self__", None)
        if owner is __self:  # our own charge(...), put there by _Meter
            return __function(*args)
        args = tuple(__self.charge(argument) for argument in args)
        __self.charge(kwargs)
        if owner is not None and not isinstance(owner, (LoopContext, TemplateReference, Cycler, _Dict)):
            args = __self._charge_method(__function.__name__, owner, args, kwargs)
        return __self.charge(super().call(__context, __function, *args, **kwargs))

    def _charge_method(self, name: str, owner: Any, args: tuple, kwargs: dict) -> tuple:
        """Pay for a method of a string, list or dict; its arguments, the iterator of a `join` drawn."""
        if name not in METHODS:
            raise SecurityError(f"the method {name!r} of {type(owner).__name__} is not offered to chat templates")
        if name not in ("get", "startswith", "endswith"):  # these look at a small part of their owner
            self.charge(owner, by_item=name in ("split", "rsplit", "splitlines"))
        if name == "replace":
            self.spend(owner.count(args[0]) * len(args[1]) // CHARS_PER_UNIT)  # for what will be put in
        return (self._drawn(args[0], owner), *args[1:]) if name == "join" else args

    def _drawn(self, items: Any, separator: str) -> list:
        """The items that `join` will join, with the copies of the separator paid for."""
        drawn = list(self.charge(items, by_item=True))
        self.spend(len(drawn) * (1 + len(separator) // CHARS_PER_UNIT))
        return drawn

    def _replace(self, text: Any, old: Any, new: Any, count: int | None = None) -> str:
        """The filter `replace`."""
        text, old, new = str(self.charge(text)), str(self.charge(old)), str(self.charge(new))
        self.spend(text.count(old) * len(new) // CHARS_PER_UNIT)
        return self.charge(text.replace(old, new, -1 if count is None else count))

    def _join(self, items: Any, d: Any = "", attribute: Any = None) -> str:
        """The filter `join`."""
        d = str(self.charge(d))
        if attribute is not None:
            items = map(make_attrgetter(self, attribute), self.charge(items, by_item=True))
        return self.charge(d.join(map(str, self._drawn(items, d))))

    def _metered(self, function: Any, by_item: bool = False) -> Any:
        """A filter or test that pays for what it is given and for what it gives back."""

        @functools.wraps(function)  # keeps jinja's mark on functions that take the context first
        def metered(*args: Any, **kwargs: Any) -> Any:
            args = tuple(self.charge(argument, by_item) for argument in args)
            self.charge(kwargs)
            return self.charge(function(*args, **kwargs))

        return metered

    def _tojson(self, value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        """transformers' `tojson`, written piece by piece so that each piece is paid for."""
        if len(indent if isinstance(indent, str) else range(indent or 0)) > 16:
            raise SecurityError("tojson: indent is at most 16")
        if separators is not None and sum(map(len, separators)) > 16:
            raise SecurityError("tojson: separators have at most 16 characters")
        self.charge(value)
        options = {"ensure_ascii": ensure_ascii, "indent": indent, "separators": separators, "sort_keys": sort_keys}
        return "".join(self.charge(piece) for piece in json.JSONEncoder(**options).iterencode(value))


@jinja2.pass_context  # with the context, so that jinja calls it while rendering and never while compiling
def _pay_for_output(context: Any, value: Any) -> Any:
    return context.environment.charge(value)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    if len(format) > 100:
        raise SecurityError("strftime_now: the format has at most 100 characters")
    return datetime.now().strftime(format)


class _Dict:
    """`dict` without the class behind it, as in transformers."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace`: no underscore names, as in transformers; never printed, as it could hold itself many times over."""

    def __init__(*args: Any, **kwargs: Any):
        self, values = args[0], dict(*args[1:], **kwargs)
        Namespace.__init__(self, {_public(name): value for name, value in values.items()})

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(_public(name), value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _public(name: Any) -> Any:
    if str(name).startswith("_"):
        raise SecurityError(f"a namespace cannot store {str(name)[:50]!r}: the name starts with an underscore")
    return name


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` marks the assistant's words; here they are plain text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Meter(NodeTransformer):
    """Writes the payments into a template's syntax tree, for what does not pass through a method of the environment."""

    def visit_Template(self, node: nodes.Template) -> nodes.Template:
        self.generic_visit(node)
        node.set_environment(node.environment)
        return node.set_lineno(1)

    def visit_For(self, node: Any) -> Any:
        """Also Macro, CallBlock and Block: each pass through the body costs as many units as the body has nodes."""
        units = sum(1 for _ in node.find_all(nodes.Node))
        self.generic_visit(node)
        pay = _pay("spend", nodes.Const(units))
        if isinstance(node, nodes.For) and node.test is not None:
            node.test = nodes.And(pay, node.test)  # the condition of a loop runs for items that never reach the body
        node.body.insert(0, nodes.ExprStmt(pay))
        return node.set_lineno(node.lineno)

    visit_Macro = visit_CallBlock = visit_Block = visit_For

    def visit_Output(self, node: nodes.Output) -> nodes.Output:
        """Literal text becomes an expression, so that it passes `_pay_for_output` like everything that is printed."""
        self.generic_visit(node)
        node.nodes = [
            nodes.Const(n.data, lineno=n.lineno) if isinstance(n, nodes.TemplateData) else n for n in node.nodes
        ]
        return node

    def visit_List(self, node: Any) -> Any:
        """Also Tuple, Dict and slices: new values. `[x, x]` again and again is small in memory and endless to print."""
        self.generic_visit(node)
        target = isinstance(node, nodes.Tuple) and node.ctx != "load"
        subscript = isinstance(node, nodes.Getitem) and not isinstance(node.arg, nodes.Slice)
        return node if target or subscript else _pay("charge", node)

    visit_Tuple = visit_Dict = visit_Getitem = visit_List

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        """`==` and `in` look through both sides."""
        self.generic_visit(node)
        node.expr = _pay("charge", node.expr)
        for operand in node.ops:
            operand.expr = _pay("charge", operand.expr)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        self.generic_visit(node)
        return _pay("concatenate", *node.nodes)


def _pay(method: str, *arguments: nodes.Expr) -> nodes.Call:
    """The expression `environment.method(*arguments)`."""
    line = arguments[0].lineno
    return nodes.Call(nodes.EnvironmentAttribute(method), list(arguments), [], None, None).set_lineno(line or 1)
