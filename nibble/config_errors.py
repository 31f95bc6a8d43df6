"""What is wrong with a config, in words: where, which key, what it takes, what was meant."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from nibble.errors import closest, did_you_mean

_SHOWN = 10
_WIDTH = 60
_START = "input should be "
# Where the words of pydantic are those of a programmer.
_RULES = {
    "bool_type": f"{_START}true or false",
    "too_short": f"{_START}a list of at least one name",
    "int_parsing_size": f"{_START}an integer of at most 18 digits",
}


def explain_all(
    error: ValidationError, names: Collection[str], places: Mapping[str, str]
) -> list[str]:
    """A line for each wrong key, ten at most; the alternatives of a key are joined.

    Args:
        names: Every dotted key of the config.
        places: By dotted key: the file and line where it stands.
    """
    wrong: dict[str, list[Any]] = {}
    known = {*names, *sections(names)}
    for problem in error.errors(include_url=False):
        parts = [str(part) for part in problem["loc"]]
        while ".".join(parts) not in known and problem["type"] != "extra_forbidden" and parts[1:]:
            parts.pop()
        wrong.setdefault(".".join(parts), []).append(problem)
    lines = [
        places.get(key, "") + _explain(key, problems, names)
        for key, problems in list(wrong.items())[:_SHOWN]
    ]
    num_more = len(wrong) - len(lines)
    return [*lines, f"and {num_more} more"] if num_more else lines


def sections(names: Collection[str]) -> dict[str, str]:
    """Every section with the first of its keys."""
    found: dict[str, str] = {}
    for name in names:
        if "." in name:
            found.setdefault(name.partition(".")[0], name)
    return found


def short(value: Any) -> str:
    """A value as JSON, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= _WIDTH else f"{text[:_WIDTH]}..."


def _explain(key: str, problems: Sequence[Any], names: Collection[str]) -> str:
    if problems[0]["type"] == "extra_forbidden":
        return f"unknown config key {key[:_WIDTH]!r}{_other_key(key, names)}"
    first, *others = dict.fromkeys(_rule(key, problem, names) for problem in problems)
    rules = [first, *(rule.removeprefix(_START) for rule in others)]
    value = problems[0]["input"]
    return f"{key}: {' or '.join(rules)}, got {short(value)}{_other_value(value, problems)}"


def _rule(key: str, problem: Any, names: Collection[str]) -> str:
    """What one alternative of a key takes."""
    if problem["type"] == "model_type":
        return f"{_START}a section with keys such as {sections(names)[key]}"
    rule = _RULES.get(problem["type"]) or str(problem["msg"]).lower()
    item = problem["loc"][-1]
    return rule.replace("input", f"item {item + 1}") if isinstance(item, int) else rule


def _other_key(key: str, names: Collection[str]) -> str:
    """What was meant by an unknown key: it is in another section, or spelt otherwise."""
    section, _, last = key.rpartition(".")
    if key in names:
        return f": write `{section}:` and, indented below it, `{last}:`"
    namesakes = [f'"{name}"' for name in names if name.rpartition(".")[2] == last]
    if namesakes:
        return f": did you mean {' or '.join(namesakes)}?"
    inside = {name.rpartition(".")[2]: name for name in names if name.startswith(f"{section}.")}
    if inside:
        meant = closest(last[:_WIDTH], inside)
    else:
        spelt = {name.rpartition(".")[2]: name for name in names}
        meant = closest(key[:_WIDTH], {**spelt, **{name: name for name in sections(names)}})
    return f': did you mean "{meant}"?' if meant else f": expected {_listed(inside, names)}"


def _listed(inside: Collection[str], names: Collection[str]) -> str:
    """What may stand in a section, or at the top."""
    top = [*(name for name in names if "." not in name), *sections(names)]
    *others, last = inside or top
    return f"{', '.join(others)} or {last}"


def _other_value(value: Any, problems: Sequence[Any]) -> str:
    """What was meant by a word that is none of those allowed."""
    expected = [problem.get("ctx", {}).get("expected", "") for problem in problems]
    allowed = [word for text in expected for word in re.findall(r"'([^']+)'", text)]
    meant = did_you_mean(value[:_WIDTH].lower(), allowed) if isinstance(value, str) else ""
    return f": {meant}" if meant else ""
