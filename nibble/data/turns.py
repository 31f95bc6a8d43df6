"""One turn of a conversation: its role, text, weight and tool calls, each checked."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from nibble.data.faults import fault
from nibble.data.strict_json import parse
from nibble.errors import DataError, did_you_mean

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
# A template may take time with the square of the turns.
MAX_TURNS = 10_000
_KNOWN_ROLES = "system, user, assistant, tool (or human, gpt)"


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
class Place:
    """Where a row stands."""

    path: str
    line: int

    def fault(self, name: str, **particulars: object) -> DataError:
        """The error for a fault of the table, at this place."""
        return fault(name, path=self.path, line=self.line, **particulars)


def read_turns(turns: object, column: str, place: Place) -> list[Message]:
    """The list of turns that stands in a column."""
    if isinstance(turns, str) and turns.lstrip().startswith("["):  # a cell of a CSV
        turns = parse_cell(turns, column, place)
    if turns is None:
        raise place.fault("null-field", field=column)
    if not isinstance(turns, list):
        raise place.fault("wrong-type", field=column, found=kind(turns), expected="a list")
    if not turns:
        raise place.fault("no-messages", field=column)
    if len(turns) > MAX_TURNS:
        raise place.fault("too-many-turns", field=column, found=len(turns), limit=MAX_TURNS)
    return [_turn(turn, number, column, place) for number, turn in enumerate(turns, start=1)]


def parse_cell(text: str, column: str, place: Place) -> object:
    """The JSON that a cell holds as text.

    Raises:
        DataError: It is not JSON that a row may hold.
    """
    try:
        return parse(text.strip())
    except DataError as error:
        raise place.fault("bad-cell", field=column, why=error.reason) from None


def _turn(turn: object, number: int, column: str, place: Place) -> Message:
    if not isinstance(turn, Mapping):
        raise place.fault("turn-not-object", turn=number, found=kind(turn))
    role_key, text_key = _turn_keys(turn, number, column, place)
    role = _role(turn, role_key, number, place)
    calls = _tool_calls(turn, role, number, place)
    content = _content(turn, text_key, number, place, is_optional=bool(calls))
    if role == "user" and not content.strip():
        raise place.fault("empty-turn", turn=number, role=role)
    extra = _extra_texts(turn, number, place)
    if calls:
        check_values(calls, f"turn {number} tool_calls", place)
        extra["tool_calls"] = calls
    return Message(role, content, _weight(turn, role, number, place), extra)


def _turn_keys(turn: Mapping[str, Any], number: int, column: str, place: Place) -> tuple[str, str]:
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


def _role(turn: Mapping[str, Any], key: str, number: int, place: Place) -> str:
    if key not in turn:
        raise place.fault("missing-role", turn=number, field=key)
    role = turn[key]
    if not isinstance(role, str):
        raise place.fault(
            "wrong-type", field=f"turn {number} {key}", found=kind(role), expected="a text"
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
    turn: Mapping[str, Any], key: str, number: int, place: Place, *, is_optional: bool
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
        raise place.fault("wrong-type", field=where, found=kind(content), expected="a text")
    return clean(content, where, place)


def _extra_texts(turn: Mapping[str, Any], number: int, place: Place) -> dict[str, Any]:
    """The texts beside the content that a template may use."""
    extra: dict[str, Any] = {}
    for key in ("name", "tool_call_id", "reasoning_content", "thinking"):
        text, where = turn.get(key), f"turn {number} {key}"
        if text is None:
            continue
        if not isinstance(text, str):
            raise place.fault("wrong-type", field=where, found=kind(text), expected="a text")
        extra[key] = clean(text, where, place)
    return extra


def _part(part: object, number: int, place: Place) -> str:
    """The text of one part of a content list in OpenAI's form."""
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return part["text"]
    found = part.get("type", "object") if isinstance(part, Mapping) else kind(part)
    raise place.fault("bad-part", turn=number, found=found)


def _weight(turn: Mapping[str, Any], role: str, number: int, place: Place) -> bool | None:
    weight = turn.get("weight")
    if weight is None:
        return None
    if role != "assistant":
        raise place.fault("weight-not-assistant", turn=number, role=role)
    if not isinstance(weight, int | float) or weight not in (0, 1):
        raise place.fault("bad-weight", turn=number, found=str(weight)[:40])
    return bool(weight)


def _tool_calls(
    turn: Mapping[str, Any], role: str, number: int, place: Place
) -> list[dict[str, Any]]:
    """The calls with their arguments as objects, which is what templates expect."""
    calls = turn.get("tool_calls")
    if calls is None or calls == []:
        return []
    if role != "assistant":
        raise place.fault("calls-not-assistant", turn=number, role=role)
    if not isinstance(calls, list):
        raise place.fault("bad-tool-calls", turn=number, why=f"they are {kind(calls)}, not a list")
    return [_tool_call(call, number, place) for call in calls]


def _tool_call(call: object, number: int, place: Place) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        raise place.fault("bad-tool-calls", turn=number, why="a call is no object")
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise place.fault("bad-tool-calls", turn=number, why="a call has no function name")
    arguments = function.get("arguments", {})
    whose = f"the arguments of {function['name'][:40]}"
    if isinstance(arguments, str):
        try:
            arguments = parse(arguments.strip() or "{}")
        except DataError as error:
            why = f"{whose} are not JSON that a row may hold ({error.reason})"
            raise place.fault("bad-tool-calls", turn=number, why=why) from None
    if not isinstance(arguments, Mapping):
        why = f"{whose} are {kind(arguments)}, not an object"
        raise place.fault("bad-tool-calls", turn=number, why=why)
    kept = {key: call[key] for key in call if key not in ("function", "name", "arguments")}
    kept.setdefault("type", "function")
    return kept | {"function": {"name": function["name"], "arguments": arguments}}


_SURROGATE = re.compile("[\ud800-\udfff]")


def clean(text: str, where: str, place: Place) -> str:
    """The text itself; what no tokenizer can take is refused."""
    if "\0" in text:
        raise place.fault("nul", where=where)
    half = _SURROGATE.search(text)
    if half:
        raise place.fault("lone-surrogate", where=where, code=ord(half.group()))
    return text


def check_values(value: object, where: str, place: Place) -> None:
    """Refuse what neither JSON nor a tokenizer can take, however deep it stands."""
    for leaf in leaves(value):
        if isinstance(leaf, str):
            clean(leaf, where, place)
        elif isinstance(leaf, float) and not math.isfinite(leaf):
            raise place.fault("not-finite", where=where)
        elif leaf is not None and not isinstance(leaf, int | float):
            raise place.fault("foreign-value", where=where, found=kind(leaf))


def leaves(value: object) -> Iterator[object]:
    """Keys and values without parts of their own, however deep they stand."""
    todo = [value]
    while todo:
        found = todo.pop()
        if isinstance(found, Mapping):
            todo += [*found, *found.values()]
        elif isinstance(found, list | tuple):
            todo += found
        else:
            yield found


def kind(value: object) -> str:
    """A JSON type in words."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    names |= {int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)
