"""Render a chat template safely: sandboxed Jinja with a cap on time and on size.

Templates come with a model, so they are foreign code. They see only the messages and the
names of special tokens, cannot change what they are given, and are stopped by a clock that
ticks in every loop and every call. What this module does not know: tokens, masks, rows.
"""

import functools
import json
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_RENDER_S = 2.0
MAX_RENDER_CHARS = 16 * 1024 * 1024

# The date that templates print. Fixed, so that a run gives the same tokens on every day;
# Source: the default date_string of Meta's Llama 3.1 chat template.
TEMPLATE_DATE = datetime(2024, 7, 26)

PLAIN_TEMPLATE = (
    "{{ bos_token }}"
    "{% for m in messages %}"
    "### {{ {'user': 'User', 'assistant': 'Assistant', 'system': 'System', 'tool': 'Tool'}"
    "[m['role']] }}:\n{{ m['content'] or '' }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\n\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
)
"""The chat template of a model that has none.

    <bos>### System:        BOS only where the tokenizer puts one by itself
    ...
    ### User:
    ...
    ### Assistant:
    ...<eos>                 the end of turn is EOS, and it is a target
"""


_WIDE_FORMAT = re.compile(r"(?:%[^%a-zA-Z]{0,8}|\{[^{}]{0,40}:[^{}]{0,8}?)\d{8,}")


class TemplateError(Exception):
    """A template that is broken, refuses its input, or outgrows its caps."""


class _RefusalError(Exception):
    """A template called `raise_exception`."""


class _Clock(threading.local):
    """The moment at which the render of this thread must have ended."""

    deadline = float("inf")


class _CappedCode(CodeGenerator):
    """Sends `a ~ b` through the environment, where its size is checked."""

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:
        self.write("environment.concat_capped((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


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


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox of jinja2 with caps; conventions as in transformers."""

    code_generator_class = _CappedCode
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
            finalize=self._capped,
        )
        self._clock = _Clock()
        self.filters = {name: self._guard(f) for name, f in self.filters.items()}
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _refuse
        self.globals["strftime_now"] = TEMPLATE_DATE.strftime

    def start(self, seconds: float) -> None:
        """Set the deadline of the render that begins now in this thread."""
        self._clock.deadline = time.monotonic() + seconds

    def tick(self) -> None:
        """Stop a render that runs for too long."""
        if time.monotonic() > self._clock.deadline:
            raise TemplateError(f"it ran for more than {MAX_RENDER_S:g} seconds")

    def concat_capped(self, parts: Sequence[object]) -> str:
        """Join the parts of `a ~ b`."""
        return self._capped("".join(str(part) for part in parts))

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.tick()
        if isinstance(getattr(obj, "__self__", None), str | list):
            _refuse_huge_numbers((*args, *kwargs.values()))
            _refuse_wide_format(obj.__self__)
        return self._capped(super().call(context, obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """The sandbox's `str.format`, which may not make huge widths."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        _refuse_wide_format(value.__self__)
        has_inner_width = re.search(r"\{[^{}]*\{", value.__self__) is not None

        def checked(*args: Any, **kwargs: Any) -> str:
            if has_inner_width:
                _refuse_huge_numbers((*args, *kwargs.values()))
            return wrapped(*args, **kwargs)

        return checked

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*" and not (_is_number(left) and _is_number(right)):
            size, times = (right, left) if _is_number(left) else (left, right)
            if hasattr(size, "__len__") and len(size) * times > MAX_RENDER_CHARS:
                raise TemplateError(f"it makes a text of {len(size) * times:,} characters")
        elif operator == "**":
            _refuse_huge_numbers((left, right), limit=1024)
        elif operator == "%":
            _refuse_wide_format(left)
        return self._capped(super().call_binop(context, operator, left, right))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            tick = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
            loop.body.insert(0, nodes.ExprStmt(tick).set_lineno(loop.lineno))
        return tree

    def _guard(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            _refuse_huge_numbers((*args[1:], *kwargs.values()))
            _refuse_wide_format(args[0] if args else None)
            return self._capped(function(*args, **kwargs))

        return guarded

    def _capped(self, value: Any) -> Any:
        if isinstance(value, str) and len(value) > MAX_RENDER_CHARS:
            raise TemplateError(f"it makes a text of {len(value):,} characters")
        return value


def render(
    source: str, messages: Sequence[Mapping[str, Any]], *, variables: Mapping[str, Any]
) -> str:
    """The text that a template makes of messages.

    Raises:
        TemplateError: The template has a syntax error, refuses the messages, uses what is not
            there, or makes more than `MAX_RENDER_CHARS` or runs longer than `MAX_RENDER_S`.
    """
    environment = _shared_environment()
    try:
        template = _compile(source)
        environment.start(MAX_RENDER_S)
        parts, size = [], 0
        for part in template.generate({"messages": messages, **variables}):
            size += len(part)
            if size > MAX_RENDER_CHARS:
                raise TemplateError(f"it makes a text of more than {MAX_RENDER_CHARS:,} characters")
            parts.append(part)
        return "".join(parts)
    except TemplateError:
        raise
    except _RefusalError as error:
        raise TemplateError(f'it says "{error}"') from None
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"line {error.lineno} of it is wrong: {error.message}") from None
    except RecursionError:
        raise TemplateError("it calls itself without end") from None
    except MemoryError:
        raise TemplateError("it needs more memory than there is") from None
    except Exception as error:  # a template is foreign code: whatever it raises is its fault
        raise TemplateError(f"{type(error).__name__}: {error}") from None


@functools.lru_cache(maxsize=1)
def _shared_environment() -> _Environment:
    return _Environment()


@functools.lru_cache(maxsize=32)
def _compile(source: str) -> jinja2.Template:
    return _shared_environment().from_string(source)


def _refuse(message: object) -> None:
    raise _RefusalError(str(message))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def _refuse_huge_numbers(values: Sequence[object], *, limit: float = MAX_RENDER_CHARS) -> None:
    """Widths and counts beyond the cap are refused before they become a text."""
    for value in values:
        if isinstance(value, int) and abs(value) > limit:
            raise TemplateError(f"it uses the number {str(value)[:20]} as a size")


def _refuse_wide_format(value: object) -> None:
    """A width of eight digits in a format string is a text of ten million characters."""
    if isinstance(value, str) and _WIDE_FORMAT.search(value):
        raise TemplateError("it formats a value to a width of more than ten million characters")


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without HTML escapes, as transformers gives it to templates."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
