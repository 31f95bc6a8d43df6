"""One row of columns to one Conversation: five formats, their aliases and their checks.

    messages           {"messages": [{"role", "content", "weight"?, "tool_calls"?}, ...], "tools"?}
    sharegpt           {"conversations": [{"from", "value"}, ...], "system"?, "tools"?}
    alpaca             {"instruction", "input"?, "output", "system"?, "history"?}
    prompt-completion  {"prompt", "completion"} and the aliases of PROMPTS and COMPLETIONS
    text               {"text"}

Other columns are allowed and unused. Nothing here reads files.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from nibble.data.faults import fault
from nibble.data.turns import (
    Conversation,
    Message,
    Place,
    check_values,
    clean,
    kind,
    parse_cell,
    read_turns,
)
from nibble.errors import did_you_mean

PROMPTS = ("prompt", "instruction", "question", "input", "query", "problem", "user")
COMPLETIONS = ("completion", "response", "answer", "output", "solution", "assistant")
FORMATS = ("messages", "sharegpt", "alpaca", "prompt-completion", "text")
_MAX_HINTS = 20
_PREFERENCE = {"chosen", "rejected"}
_CLAIMED = {
    "messages": "messages",
    "sharegpt": "conversations",
    "alpaca": "instruction and output",
    "prompt-completion": "prompt and completion",
    "text": "text",
}


def detect_format(columns: Iterable[str], *, path: str = "", line: int = 0) -> str:
    """The format that has these columns.

    Raises:
        DataError: No format has them, or several columns could be the prompt or the answer.

    >>> detect_format(["question", "answer"])
    'prompt-completion'
    """
    names = [str(name) for name in columns]
    place = Place(path, line)
    for format in FORMATS:
        if _has_format(format, names, place):
            return format
    if _PREFERENCE & set(names):
        raise place.fault("preference-row", columns=", ".join(names))
    known = ("messages", "conversations", "text", *PROMPTS, *COMPLETIONS)
    unknown = [name for name in names if name not in known]
    hints = [did_you_mean(name[:40], known) for name in unknown[:_MAX_HINTS]]
    hint = next((f" ({text})" for text in hints if text), "")
    raise place.fault("unknown-columns", columns=", ".join(names) or "(none)", hint=hint)


def row_to_conversation(row: object, *, format: str, path: str, line: int) -> Conversation:
    """Check one row and bring it into the common shape.

    Args:
        row: What stands in the file, expected to be a mapping of columns.
        format: One of FORMATS, or "auto" to go by the columns.

    Raises:
        DataError: With path, line, reason and fix.
    """
    place = Place(path, line)
    if not isinstance(row, Mapping):
        raise place.fault("not-object", found=kind(row))
    if not row:
        raise place.fault("empty-row")
    if format == "auto":
        format = detect_format(row, path=path, line=line)
    elif not _has_format(format, list(row), place):
        raise place.fault(
            "wrong-format", columns=", ".join(row), expected=_CLAIMED[format], format=format
        )
    messages = _READERS[format](row, place)
    if format != "text" and not any(m.role == "assistant" for m in messages):
        raise place.fault("no-assistant")
    return Conversation(
        messages=tuple(messages),
        path=path,
        line=line,
        is_text=format == "text",
        format=format,
        tools=_tools(row, place),
    )


def check_format_name(format: str) -> None:
    """Refuse a format that is neither "auto" nor one of FORMATS."""
    if format not in ("auto", *FORMATS):
        hint = did_you_mean(format, FORMATS)
        raise fault(
            "unknown-format",
            format=format,
            hint=f" ({hint})" if hint else "",
            known=", ".join(("auto", *FORMATS)),
        )


def _has_format(format: str, names: list[str], place: Place) -> bool:
    has = set(names)
    if format == "messages":
        return "messages" in has
    if format == "sharegpt":
        return "conversations" in has or "conversation" in has
    if format == "alpaca":
        return "instruction" in has and (
            "output" in has or ("response" in has and bool(has & {"input", "context"}))
        )
    if format == "prompt-completion":
        return _pair(names, place) is not None
    return "text" in has


def _pair(names: list[str], place: Place) -> tuple[str, str] | None:
    """The prompt's and the completion's column, or None where one of them is missing."""
    if "prompt" in names and "completion" in names:
        return "prompt", "completion"
    prompts = [name for name in names if name in PROMPTS]
    completions = [name for name in names if name in COMPLETIONS]
    if not prompts or not completions:
        return None
    for what, found in (("prompt", prompts), ("answer", completions)):
        if len(found) > 1:
            raise place.fault("ambiguous-columns", what=what, columns=", ".join(found))
    return prompts[0], completions[0]


def _read_messages(row: Mapping[str, Any], place: Place) -> list[Message]:
    return read_turns(row["messages"], "messages", place)


def _read_sharegpt(row: Mapping[str, Any], place: Place) -> list[Message]:
    column = "conversations" if "conversations" in row else "conversation"
    turns = read_turns(row[column], column, place)
    has_system = bool(turns) and turns[0].role == "system"
    return turns if has_system else _system(row, place) + turns


def _read_alpaca(row: Mapping[str, Any], place: Place) -> list[Message]:
    more = "input" if "input" in row else "context"
    answer = "output" if "output" in row else "response"
    question = _text(row, "instruction", place, can_be_empty=bool(row.get(more)))
    addition = "" if row.get(more) is None else _text(row, more, place, can_be_empty=True)
    parts = [part for part in (question, addition) if part.strip()]
    messages = _system(row, place) + _history(row, place)
    messages.append(Message("user", "\n\n".join(parts)))
    messages.append(Message("assistant", _text(row, answer, place, can_be_empty=True)))
    return messages


def _read_pair(row: Mapping[str, Any], place: Place) -> list[Message]:
    prompt, completion = _pair(list(row), place) or ("prompt", "completion")
    if isinstance(row[prompt], list) and isinstance(row[completion], list):
        before = read_turns(row[prompt], prompt, place)
        after = read_turns(row[completion], completion, place)
        return [replace(m, is_trained=False) for m in before] + after
    messages = _system(row, place) + _history(row, place)
    messages.append(Message("user", _text(row, prompt, place)))
    messages.append(Message("assistant", _text(row, completion, place, can_be_empty=True)))
    return messages


def _read_text(row: Mapping[str, Any], place: Place) -> list[Message]:
    return [Message("text", _text(row, "text", place))]


_READERS: dict[str, Callable[[Mapping[str, Any], Place], list[Message]]] = {
    "messages": _read_messages,
    "sharegpt": _read_sharegpt,
    "alpaca": _read_alpaca,
    "prompt-completion": _read_pair,
    "text": _read_text,
}


def _tools(row: Mapping[str, Any], place: Place) -> tuple[Mapping[str, Any], ...]:
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        tools = parse_cell(tools, "tools", place)
    if not tools:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise place.fault("bad-tools", found=kind(tools))
    check_values(tools, '"tools"', place)
    return tuple(tools)


def _system(row: Mapping[str, Any], place: Place) -> list[Message]:
    if row.get("system") is None:
        return []
    text = _text(row, "system", place, can_be_empty=True)
    return [Message("system", text)] if text.strip() else []


def _history(row: Mapping[str, Any], place: Place) -> list[Message]:
    """Earlier turns in LLaMA-Factory's form: [[question, answer], ...]."""
    history = row.get("history")
    if not history:
        return []
    if not isinstance(history, list):
        raise place.fault("bad-history")
    messages = []
    for pair in history:
        if not isinstance(pair, list) or [type(part) for part in pair] != [str, str]:
            raise place.fault("bad-history")
        question, answer = (clean(part, '"history"', place) for part in pair)
        messages += [Message("user", question), Message("assistant", answer)]
    return messages


def _text(row: Mapping[str, Any], name: str, place: Place, *, can_be_empty: bool = False) -> str:
    value = row[name]
    if value is None:
        raise place.fault("null-field", field=name)
    if not isinstance(value, str):
        raise place.fault("wrong-type", field=name, found=kind(value), expected="a text")
    if not can_be_empty and not value.strip():
        raise place.fault("empty-field", field=name)
    return clean(value, f'"{name}"', place)
