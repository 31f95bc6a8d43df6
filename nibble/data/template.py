"""Render a chat template safely: sandboxed Jinja with a cap on time and on size.

Templates come with a model, so they are foreign code. They see only the messages and the
names of special tokens, cannot change what they are given, and are stopped by the caps of
`sandbox`. What this module does not know: tokens, masks, rows.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2

from nibble.data.sandbox import MAX_RENDER_CHARS, Environment
from nibble.data.sandbox import TemplateError as TemplateError

MAX_RENDER_S = 2.0
_LONGEST_DATE_FORM = 200

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


class _RefusalError(Exception):
    """A template called `raise_exception`."""


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
        environment.start(MAX_RENDER_S)
        template = _compile(source)
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
def _shared_environment() -> Environment:
    environment = Environment()
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _date
    return environment


@functools.lru_cache(maxsize=32)
def _compile(source: str) -> jinja2.Template:
    return _shared_environment().from_string(source)


def _refuse(message: object) -> None:
    raise _RefusalError(str(message))


def _date(form: str) -> str:
    if len(form) > _LONGEST_DATE_FORM or re.search(r"\d", form):
        raise TemplateError("it asks for a date in a form that has numbers, or has no end")
    return TEMPLATE_DATE.strftime(form)
