"""The environment in which foreign templates run: jinja2's sandbox, with caps on time and memory.

    time      every loop, call and filter looks at the clock
    values    whatever a template makes is weighed: text and all that lists hold, to any depth
    steps     where a result is a product of its inputs it is estimated before it is made
    sum       all that one render has made

So no single step takes long, and no value is large enough to make one that does. Methods and
filters that are not listed here do not exist for a template.
"""

import functools
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.ext import Extension
from jinja2.nodes import EvalContext
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_RENDER_CHARS = 16 * 1024 * 1024
# Of all values that one render makes, those that it forgets included.
MAX_MADE_BYTES = 256 * 1024 * 1024
# Widths, counts and lengths of lists.
MAX_COUNT = 100_000
_MAX_INT_BITS = 4096
# What an item of a list costs beside its text.
_ITEM_BYTES = 48
_WIDE_FORMAT = re.compile(r"(?:%[^%a-zA-Z]{0,8}|\{[^{}]{0,40}:[^{}]{0,8}?)\d{6,}")
_WIDTH_OF_VALUE = re.compile(r"%[^%a-zA-Z]*\*|\{[^{}]*\{")
_METHODS: dict[type, set[str]] = {
    str: {
        "capitalize", "casefold", "center", "count", "endswith", "expandtabs", "find", "format",
        "format_map", "index", "isalnum", "isalpha", "isascii", "isdecimal", "isdigit",
        "isidentifier", "islower", "isnumeric", "isprintable", "isspace", "istitle", "isupper",
        "join", "ljust", "lower", "lstrip", "partition", "removeprefix", "removesuffix", "replace",
        "rfind", "rindex", "rjust", "rpartition", "rsplit", "rstrip", "split", "splitlines",
        "startswith", "strip", "swapcase", "title", "upper", "zfill",
    },
    dict: {"get", "items", "keys", "values"},
    list: {"count", "index"},
    tuple: {"count", "index"},
}  # fmt: skip
_FILTERS = {
    "abs", "attr", "batch", "capitalize", "center", "count", "d", "default", "dictsort", "e",
    "escape", "first", "float", "forceescape", "format", "groupby", "indent", "int", "items",
    "join", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr",
    "replace", "reverse", "round", "safe", "select", "selectattr", "slice", "sort", "string", "sum",
    "title", "trim", "truncate", "unique", "upper", "wordcount",
}  # fmt: skip
# Work on words one by one, in Python.
_SLOW_FILTERS = {"title", "wordcount", "truncate"}


class TemplateError(Exception):
    """A template that is broken, refuses its input, or outgrows its caps."""


class _Clock(threading.local):
    """When the render of this thread must have ended, and what it has made."""

    seconds = 0.0
    deadline = float("inf")
    made = 0


class _CappedCode(CodeGenerator):
    """Sends what a template makes by itself through the environment, where it is weighed."""

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:
        self.write("environment.concat_capped((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_List(self, node: nodes.List, frame: Any) -> None:
        self._capped(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Any) -> None:
        self._capped(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Any) -> None:
        if node.ctx == "load":
            self._capped(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def _capped(self, visit: Callable[[Any, Any], None], node: nodes.Node, frame: Any) -> None:
        self.write("environment.capped(")
        visit(node, frame)
        self.write(")")


class _Generation(Extension):
    """`{% generation %}`: marks what the model writes, where the template says so.

    With `generation_marks` given, the text of a block comes out between its two characters.
    """

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marks = nodes.Name("generation_marks", "load")
        return nodes.CallBlock(self.call_method("_mark", [marks]), [], [], body).set_lineno(line)

    def _mark(self, marks: Any, caller: Callable[[], str]) -> str:
        text = caller()
        return f"{marks[0]}{text}{marks[1]}" if marks else text


class _Namespace(Namespace):
    """jinja2's, without a text: that of one that holds much would be made anew wherever it is."""

    def __repr__(self) -> str:
        return "<Namespace>"


class Environment(ImmutableSandboxedEnvironment):
    """The sandbox of jinja2 with caps; conventions as in transformers."""

    code_generator_class = _CappedCode
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
            finalize=self.capped,
        )
        self._clock = _Clock()
        self.concat: Any = self.concat_capped
        known = {name: filter_ for name, filter_ in self.filters.items() if name in _FILTERS}
        known["tojson"] = self._to_json
        self.filters = {name: self._guard(name, filter_) for name, filter_ in known.items()}
        self.globals["namespace"] = _Namespace
        del self.globals["lipsum"]

    def start(self, seconds: float) -> None:
        """Begin a render in this thread."""
        self._clock.seconds, self._clock.made = seconds, 0
        self._clock.deadline = time.monotonic() + seconds

    def tick(self) -> None:
        """Stop a render that runs for too long."""
        if time.monotonic() > self._clock.deadline:
            raise TemplateError(f"it ran for more than {self._clock.seconds:g} seconds")

    def capped(self, value: Any) -> Any:
        """The value itself, if it and all that was made so far are small enough."""
        self._clock.made += weigh(value)
        if self._clock.made > MAX_MADE_BYTES:
            raise TemplateError(f"it makes more than {MAX_MADE_BYTES:,} bytes on its way")
        return value

    def concat_capped(self, parts: Iterable[object]) -> str:
        """Join the parts of `a ~ b`, or of a block."""
        parts = list(parts)
        _refuse_size(sum(weigh(part) for part in parts))
        return self.capped("".join(str(part) for part in parts))

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.tick()
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        for kind in (str, bytes, int, float, list, tuple, dict, set, frozenset):
            if isinstance(owner, kind) and name not in _METHODS.get(kind, ()):
                raise TemplateError(f"it calls {name}() of a {kind.__name__}")
        if isinstance(owner, str):
            args = _checked_step(name, owner, args, kwargs)
        return self.capped(super().call(context, obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """The sandbox's `str.format`, whose result is estimated first."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def checked(*args: Any, **kwargs: Any) -> str:
            _check_format(value.__self__, "{", (*args, *kwargs.values()))
            return wrapped(*args, **kwargs)

        return checked

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * abs(right) if operator == "**" else 0
            _refuse_size(0 if bits <= _MAX_INT_BITS else bits + MAX_RENDER_CHARS)
        elif operator == "*":
            number = left if isinstance(left, int) else right if isinstance(right, int) else 0
            _refuse_size(max(weigh(left), weigh(right)) * number if number != 0 else 0)
        elif operator == "%" and isinstance(left, str | bytes):
            values = right if isinstance(right, tuple) else (right,)
            _check_format(str(left), "%", values)
        return self.capped(super().call_binop(context, operator, left, right))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            tick = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
            loop.body.insert(0, nodes.ExprStmt(tick).set_lineno(loop.lineno))
        return tree

    def _guard(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            given = sum(isinstance(arg, EvalContext | Context | Environment) for arg in args)
            if len(args) > given:
                first, rest = args[given], args[given + 1 :]
                first, rest = _checked_filter(name, first, rest, kwargs)
                args = (*args[:given], first, *rest)
            return self.capped(function(*args, **kwargs))

        return guarded

    def _to_json(
        self,
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """JSON without HTML escapes, as transformers gives it to templates."""
        weigh(value)
        encoder = json.JSONEncoder(
            ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )
        parts, size = [], 0
        for part in encoder.iterencode(value):
            size += len(part)
            _refuse_size(size)
            parts.append(part)
        return "".join(parts)


def weigh(value: object) -> int:
    """Bytes of a value with all that it holds, each time that it holds it.

    Raises:
        TemplateError: If that is more than a template may make.
    """
    total, waiting = 0, [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str | bytes):
            total += len(item)
        elif isinstance(item, int):
            if item.bit_length() > _MAX_INT_BITS:
                raise TemplateError("it makes a number of more than a thousand digits")
        elif isinstance(item, list | tuple | set | frozenset | dict):
            total += _ITEM_BYTES * len(item)
            _refuse_size(total)
            waiting.extend(item)
            waiting.extend(item.values() if isinstance(item, dict) else ())
        _refuse_size(total)
    return total


def _refuse_size(size: int) -> None:
    if size > MAX_RENDER_CHARS:
        raise TemplateError(f"it makes a text of {size:,} characters")


def _refuse_counts(values: Iterable[object], limit: int = MAX_COUNT) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > limit:
            raise TemplateError(f"it uses the number {str(value)[:20]} as a size")


def _checked_step(name: str, text: str, args: tuple[Any, ...], kwargs: Any) -> tuple[Any, ...]:
    """The arguments of a method of a text, whose result is small enough."""
    if name in ("format", "format_map"):
        return args
    values = (*args, *kwargs.values())
    _refuse_counts(values)
    if name == "expandtabs":
        _refuse_size(text.count("\t") * max((v for v in values if isinstance(v, int)), default=8))
    elif name == "replace" and len(args) > 1:
        old, new = str(args[0]), str(args[1])
        _refuse_size(len(text) + (text.count(old) * len(new)))
    elif name == "join" and args:
        items = list(args[0])
        _refuse_size(weigh(items) + len(text) * len(items))
        args = (items, *args[1:])
    return args


def _checked_filter(
    name: str, value: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, tuple[Any, ...]]:
    """The arguments of a filter, whose result is small enough."""
    values = (*rest, *kwargs.values())
    if name == "format":
        _check_format(str(value), "%", values)
        return value, rest
    _refuse_counts(values)
    weight = weigh(value)
    if name in _SLOW_FILTERS:
        _refuse_size(0 if weight <= MAX_COUNT * 10 else weight + MAX_RENDER_CHARS)
    elif name == "replace" and len(values) > 1:
        _checked_step("replace", str(value), (values[0], values[1]), {})
    elif name == "join":
        value = list(value)
        separator = str(rest[0]) if rest else str(kwargs.get("d", ""))
        _refuse_size(weigh(value) + len(separator) * len(value))
    elif name == "indent" and not isinstance(value, str):
        # jinja2 would add to a list in place, and so to the messages.
        raise TemplateError("it indents what is no text")
    elif name == "indent":
        widths = (len(v) if isinstance(v, str) else v for v in values if isinstance(v, int | str))
        _refuse_size(str(value).count("\n") * max(widths, default=4))
    elif name == "sum" and not all(isinstance(v, int | float | str) for v in values):
        raise TemplateError("it sums what are no numbers")
    return value, rest


def _check_format(text: str, sign: str, values: Sequence[object]) -> None:
    """Refuse a format whose fields could make too much, each of the largest value or width."""
    if _WIDE_FORMAT.search(text):
        raise TemplateError("it formats a value to a width of more than a hundred thousand")
    if _WIDTH_OF_VALUE.search(text):
        _refuse_counts(values)
    width = max((int(n) for n in re.findall(r"\d{1,5}", text)), default=0)
    _refuse_size(len(text) + text.count(sign) * max(width, weigh(list(values))))
