"""One row of columns to one Conversation: five formats, their aliases and their checks.

    messages           {"messages": [{"role", "content", "weight"?, "tool_calls"?}, ...], "tools"?}
    sharegpt           {"conversations": [{"from", "value"}, ...], "system"?, "tools"?}
    alpaca             {"instruction", "input"?, "output", "system"?, "history"?}
    prompt-completion  {"prompt", "completion"} and the aliases of PROMPTS and COMPLETIONS
    text               {"text"}

Other columns are allowed and unused. Nothing here reads files.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nibble.data.faults import fault
from nibble.errors import DataError, did_you_mean

PROMPTS = ("prompt", "instruction", "question", "input", "query", "problem", "user")
COMPLETIONS = ("completion", "response", "answer", "output", "solution", "assistant")
FORMATS = ("messages", "sharegpt", "alpaca", "prompt-completion", "text")
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_KNOWN_ROLES = "system, user, assistant, tool (or human, gpt)"
_PREFERENCE = {"chosen", "rejected"}
_CLAIMED = {
    "messages": "messages",
    "sharegpt": "conversations",
    "alpaca": "instruction and output",
    "prompt-completion": "prompt and completion",
    "text": "text",
}


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    `is_trained` is None where the file says nothing, else whether its weight is 1. `extra`
    holds what only the template understands: tool_calls, name, tool_call_id, reasoning_content.
    """

    role: str
    content: str
    is_trained: bool | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Conversation:
    """One example with its origin; `is_text` means plain text in a single message."""

    messages: tuple[Message, ...]
    path: str
    line: int
    is_text: bool = False
    format: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class _Place:
    path: str
    line: int

    def fault(self, name: str, **particulars: object) -> DataError:
        return fault(name, path=self.path, line=self.line, **particulars)


def detect_format(columns: Iterable[str], *, path: str = "", line: int = 0) -> str:
    """The format that has these columns.

    Raises:
        DataError: No format has them, or several columns could be the prompt or the answer.

    >>> detect_format(["question", "answer"])
    'prompt-completion'
    """
    names = [str(name) for name in columns]
    place = _Place(path, line)
    for format in FORMATS:
        if _has_format(format, names, place):
            return format
    if _PREFERENCE & set(names):
        raise place.fault("preference-row", columns=", ".join(names))
    known = ("messages", "conversations", "text", *PROMPTS, *COMPLETIONS)
    hints = [did_you_mean(name, known) for name in names if name not in known]
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
    place = _Place(path, line)
    if not isinstance(row, Mapping):
        raise place.fault("not-object", found=_kind(row))
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


def _has_format(format: str, names: list[str], place: _Place) -> bool:
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


def _pair(names: list[str], place: _Place) -> tuple[str, str] | None:
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


def _read_messages(row: Mapping[str, Any], place: _Place) -> list[Message]:
    return _turns(row["messages"], "messages", place)


def _read_sharegpt(row: Mapping[str, Any], place: _Place) -> list[Message]:
    column = "conversations" if "conversations" in row else "conversation"
    turns = _turns(row[column], column, place)
    has_system = bool(turns) and turns[0].role == "system"
    return turns if has_system else _system(row, place) + turns


def _read_alpaca(row: Mapping[str, Any], place: _Place) -> list[Message]:
    more = "input" if "input" in row else "context"
    answer = "output" if "output" in row else "response"
    question = _text(row, "instruction", place, can_be_empty=bool(row.get(more)))
    addition = "" if row.get(more) is None else _text(row, more, place, can_be_empty=True)
    parts = [part for part in (question, addition) if part.strip()]
    messages = _system(row, place) + _history(row, place)
    messages.append(Message("user", "\n\n".join(parts)))
    messages.append(Message("assistant", _text(row, answer, place, can_be_empty=True)))
    return messages


def _read_pair(row: Mapping[str, Any], place: _Place) -> list[Message]:
    pair = _pair(list(row), place)
    if pair is None:  # guarded by _has_format
        raise place.fault("missing-field", field="completion")
    prompt, completion = pair
    if isinstance(row[prompt], list) and isinstance(row[completion], list):
        before = _turns(row[prompt], prompt, place)
        untrained = [Message(m.role, m.content, False, m.extra) for m in before]
        after = _turns(row[completion], completion, place)
        return [u if u.role == "assistant" else m for u, m in zip(untrained, before)] + after
    messages = _system(row, place) + _history(row, place)
    messages.append(Message("user", _text(row, prompt, place)))
    messages.append(Message("assistant", _text(row, completion, place, can_be_empty=True)))
    return messages


def _read_text(row: Mapping[str, Any], place: _Place) -> list[Message]:
    return [Message("text", _text(row, "text", place))]


_READERS: dict[str, Callable[[Mapping[str, Any], _Place], list[Message]]] = {
    "messages": _read_messages,
    "sharegpt": _read_sharegpt,
    "alpaca": _read_alpaca,
    "prompt-completion": _read_pair,
    "text": _read_text,
}


def _turns(turns: object, column: str, place: _Place) -> list[Message]:
    if isinstance(turns, str) and turns.lstrip().startswith("["):  # a cell of a CSV
        try:
            turns = json.loads(turns)
        except ValueError as error:
            raise place.fault("bad-cell", field=column, why=error) from None
    if turns is None:
        raise place.fault("null-field", field=column)
    if not isinstance(turns, list):
        raise place.fault("wrong-type", field=column, found=_kind(turns), expected="a list")
    if not turns:
        raise place.fault("no-messages", field=column)
    return [_turn(turn, number, column, place) for number, turn in enumerate(turns, start=1)]


def _turn(turn: object, number: int, column: str, place: _Place) -> Message:
    if not isinstance(turn, Mapping):
        raise place.fault("turn-not-object", turn=number, found=_kind(turn))
    role_key, text_key = _turn_keys(turn, number, column, place)
    role = _role(turn, role_key, number, place)
    calls = _tool_calls(turn, role, number, place)
    content = _content(turn, text_key, number, place, is_optional=bool(calls))
    if role == "user" and not content.strip():
        raise place.fault("empty-turn", turn=number, role=role)
    kept = {"name", "tool_call_id", "reasoning_content", "thinking"}
    extra = {key: turn[key] for key in turn if key in kept and turn[key] is not None}
    if calls:
        extra["tool_calls"] = calls
    return Message(role, content, _weight(turn, role, number, place), extra)


def _turn_keys(
    turn: Mapping[str, Any], number: int, column: str, place: _Place
) -> tuple[str, str]:
    own, foreign = ("role", "content"), ("from", "value")
    if column.startswith("conversation"):  # ShareGPT; some files call the keys as OpenAI does
        return own if "role" in turn and "from" not in turn else foreign
    if "role" not in turn and "from" in turn:
        keys = ", ".join(str(key) for key in turn)
        raise place.fault(
            "foreign-keys",
            turn=number,
            columns=keys,
            role_key=own[0],
            text_key=own[1],
            other='"conversations"',
        )
    return own


def _role(turn: Mapping[str, Any], key: str, number: int, place: _Place) -> str:
    if key not in turn:
        raise place.fault("missing-role", turn=number, field=key)
    role = turn[key]
    if not isinstance(role, str):
        raise place.fault(
            "wrong-type", field=f"turn {number} {key}", found=_kind(role), expected="a text"
        )
    if role.lower() not in ROLES:
        hint = did_you_mean(role, ROLES)
        raise place.fault(
            "unknown-role",
            turn=number,
            role=role[:40],
            hint=f" ({hint})" if hint else "",
            known=_KNOWN_ROLES,
        )
    return ROLES[role.lower()]


def _content(
    turn: Mapping[str, Any], key: str, number: int, place: _Place, *, is_optional: bool
) -> str:
    content = turn.get(key)
    if content is None and is_optional:
        return ""
    if key not in turn:
        raise place.fault("missing-content", turn=number, field=key)
    where = f"turn {number} {key}"
    if content is None:
        raise place.fault("null-field", field=where)
    if isinstance(content, list):
        content = "".join(_part(part, number, place) for part in content)
    if not isinstance(content, str):
        raise place.fault("wrong-type", field=where, found=_kind(content), expected="a text")
    return _clean(content, where, place)


def _part(part: object, number: int, place: _Place) -> str:
    """The text of one part of a content list in OpenAI's form."""
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return part["text"]
    found = part.get("type", "object") if isinstance(part, Mapping) else _kind(part)
    raise place.fault("bad-part", turn=number, found=found)


def _weight(turn: Mapping[str, Any], role: str, number: int, place: _Place) -> bool | None:
    weight = turn.get("weight")
    if weight is None:
        return None
    if role != "assistant":
        raise place.fault("weight-not-assistant", turn=number, role=role)
    if not isinstance(weight, int | float) or weight not in (0, 1):
        raise place.fault("bad-weight", turn=number, found=json.dumps(weight)[:40])
    return bool(weight)


def _tool_calls(
    turn: Mapping[str, Any], role: str, number: int, place: _Place
) -> list[dict[str, Any]]:
    """The calls with their arguments as objects, which is what templates expect."""
    calls = turn.get("tool_calls")
    if calls is None or calls == []:
        return []
    if role != "assistant":
        raise place.fault("calls-not-assistant", turn=number, role=role)
    if not isinstance(calls, list):
        raise place.fault("bad-tool-calls", turn=number, why=f"they are {_kind(calls)}, not a list")
    return [_tool_call(call, number, place) for call in calls]


def _tool_call(call: object, number: int, place: _Place) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        raise place.fault("bad-tool-calls", turn=number, why="a call is no object")
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise place.fault("bad-tool-calls", turn=number, why="a call has no function name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError as error:
            why = f"the arguments of {function['name']} are not JSON ({error})"
            raise place.fault("bad-tool-calls", turn=number, why=why) from None
    kept = {key: call[key] for key in call if key not in ("function", "name", "arguments")}
    kept.setdefault("type", "function")
    return kept | {"function": {"name": function["name"], "arguments": arguments}}


def _tools(row: Mapping[str, Any], place: _Place) -> tuple[Mapping[str, Any], ...]:
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise place.fault("bad-cell", field="tools", why=error) from None
    if not tools:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise place.fault("bad-tools", found=_kind(tools))
    return tuple(tools)


def _system(row: Mapping[str, Any], place: _Place) -> list[Message]:
    if row.get("system") is None:
        return []
    text = _text(row, "system", place, can_be_empty=True)
    return [Message("system", text)] if text.strip() else []


def _history(row: Mapping[str, Any], place: _Place) -> list[Message]:
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
        question, answer = (_clean(part, '"history"', place) for part in pair)
        messages += [Message("user", question), Message("assistant", answer)]
    return messages


def _text(
    row: Mapping[str, Any], name: str, place: _Place, *, can_be_empty: bool = False
) -> str:
    if name not in row:
        raise place.fault("missing-field", field=name)
    value = row[name]
    if value is None:
        raise place.fault("null-field", field=name)
    if not isinstance(value, str):
        raise place.fault("wrong-type", field=name, found=_kind(value), expected="a text")
    if not can_be_empty and not value.strip():
        raise place.fault("empty-field", field=name)
    return _clean(value, f'"{name}"', place)


_SURROGATE = re.compile("[\ud800-\udfff]")


def _clean(text: str, where: str, place: _Place) -> str:
    """The text itself; what no tokenizer can take is refused."""
    if "\0" in text:
        raise place.fault("nul", where=where)
    half = _SURROGATE.search(text)
    if half:
        raise place.fault("lone-surrogate", where=where, code=ord(half.group()))
    return text


def _kind(value: object) -> str:
    """A JSON type in words."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    names |= {int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)
