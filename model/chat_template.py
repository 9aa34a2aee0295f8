"""Chat templates: a Jinja program from the checkpoint turns messages into a prompt.

The environment is that of transformers, line by line: jinja2's immutable sandbox, `trim_blocks` and `lstrip_blocks`,
loop controls, the `{% generation %}` tag, `raise_exception`, `strftime_now`, and a `tojson` that leaves HTML characters
and letters alone. So a template gives the same text here as there. Names that reach Python's internals are an error,
and not an empty text.

One thing is added. The sandbox keeps a template from files and from Python's internals, but not from running forever or
from filling the memory: `"a" * 10**10` and three nested loops are legal Jinja. Therefore templates are compiled and
rendered in a child process with limits (limited.py). A short prompt takes 0.15 to 0.2 ms there and 0.02 ms in this
process. The template of the bundled model is known (`TRUSTED`) and is rendered in this process.

    template = ChatTemplate(source)                 # ValueError: too long, or not Jinja
    prompt   = template.render(messages=[...])      # ValueError: the template fails, refuses, or exceeds a limit
"""

from __future__ import annotations

import functools
import hashlib
import json
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import Undefined, nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from model.limited import LimitedError, call_limited

MAX_SOURCE = 100_000  # characters of template; the longest that ship with released models have about 20,000
MAX_PROMPT = 5_000_000  # characters of rendered prompt: more than a million tokens
# SHA-256 of templates that were read and that do a bounded amount of work for each message.
TRUSTED = {"f91864928fccff928b3068ca784db6275e655e400ccbb28f61d92c0090caf3b3"}  # assets/countdown-tiny
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of a message's reasoning; templates read the first


class ChatTemplate:
    """A chat template. Raises ValueError if the source is too long or is not a Jinja template."""

    def __init__(self, source: str):
        if len(source) > MAX_SOURCE:
            raise ValueError(f"the chat template has {len(source)} characters; at most {MAX_SOURCE} are accepted")
        self._source = source
        self._trusted = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest() in TRUSTED
        try:
            self._call(compile_template)
        except Exception as error:  # of the trusted template or of the child
            raise ValueError(f"the chat template does not compile: {_one_line(error)}") from error

    def render(self, **variables: Any) -> str:
        """The prompt. Variables must be JSON data: the template never sees an object with methods of its own."""
        try:
            plain = json.loads(json.dumps(variables))
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"messages and template variables must be plain JSON data: {_one_line(error)}") from error
        try:
            return self._call(render_template, plain)
        except Exception as error:
            raise ValueError(f"the chat template failed: {_one_line(error)}") from error

    def _call(self, function: Any, *arguments: Any) -> Any:
        if self._trusted:
            return function(self._source, *arguments)
        return call_limited(f"{function.__module__}:{function.__name__}", self._source, *arguments)


def _one_line(error: Exception) -> str:
    """The error as one short line. That of the child is one already."""
    if isinstance(error, LimitedError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error)[:1000].split())}"[:300].removesuffix(": ")


def normalize_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages as templates expect them, as in transformers.

    Keys without a value are left out, as many templates would print "None". The reasoning of a message has several
    names, and becomes readable under the two that templates use.
    """
    normalized = []
    for message in messages:
        message = {key: value for key, value in message.items() if value is not None}
        reasoning = next((message[key] for key in REASONING if key in message), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        normalized.append(message)
    return normalized


# --- in the child process


def compile_template(source: str) -> None:
    """Raise an exception if the source is not a Jinja template."""
    _compiled(source)


def render_template(source: str, variables: dict[str, Any]) -> str:
    """The text of the template for these variables."""
    text = _compiled(source).render(**variables)
    if len(text) > MAX_PROMPT:
        raise ValueError(f"it rendered {len(text)} characters; at most {MAX_PROMPT} are accepted")
    return text


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    return environment.from_string(source)


class _Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox. A name that it keeps from the template is an error at once, and never an empty text."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        raise SecurityError(f"{attribute!r} of {type(obj).__name__} is not for templates")


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    if len(format) > 100:
        raise SecurityError("strftime_now: the format has at most 100 characters")
    return datetime.now().strftime(format)


class _Dict:
    """`dict` without the class behind it."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace` without names that begin with an underscore, which reach Python's internals."""

    def __init__(*args: Any, **kwargs: Any):  # no name for self: a template may store the name "self"
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _check_public(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public(name)
        super().__setitem__(name, value)


def _check_public(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot store {name[:50]!r}: the name starts with an underscore")


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` marks the assistant's words. Here they are plain text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)
