"""YAML as a config file needs it: strict, with the line of every key.

Of YAML's many ways to write a thing only the plain ones count. Numbers are decimal; yes, 010,
1:30 and 2024-01-01 are text. Aliases and tags are refused, so no file can grow when it is read.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from nibble.errors import DiskError, UsageError

# The parser takes up to ten seconds a megabyte; a config has a kilobyte.
MOST_BYTES = 64 * 1024
# A run is written down as a file, which has room for other keys beside the longest value.
MOST_VALUE = MOST_BYTES // 2
_MOST_LEVELS = 9
_WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,99})")
_NUMBER = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


class _Refused(Exception):  # noqa: N818
    """Text that is no YAML or holds what no config needs; `line` counts from 1."""

    def __init__(self, problem: str, line: int, fix: str) -> None:
        super().__init__(problem)
        self.line = line
        self.fix = fix


def read(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The mapping in a YAML file, and the line (from 1) of each dotted key.

    Raises:
        UsageError: If the file is no YAML mapping, or a key stands twice.
        DiskError: If the file cannot be read.
    """
    values, lines = _parsed(path)
    if values is None:
        return {}, {}
    if not isinstance(values, dict):
        raise UsageError(
            f"{path}:1: holds {type(values).__name__}, expected sections and keys",
            fix="write a section, such as `optim:`, and its keys below it",
        )
    return values, lines


def read_list(path: Path) -> list[Any]:
    """The list in a YAML file; nothing where the file is empty.

    Raises:
        UsageError: If the file is no YAML list.
        DiskError: If the file cannot be read.
    """
    values, _ = _parsed(path)
    if values is not None and not isinstance(values, list):
        raise UsageError(
            f"{path}:1: holds {type(values).__name__}, expected a list",
            fix="begin each item with `- `",
        )
    return values or []


def _parsed(path: Path) -> tuple[Any, dict[str, int]]:
    try:
        return _parse(_text(path))
    except _Refused as error:
        raise UsageError(f"{path}:{error.line}: {error}", fix=error.fix) from None


def parse_value(text: str) -> Any:
    """One value as YAML reads it; text that is no YAML stays text.

    Raises:
        UsageError: If there is a control character in it, or it is too long for a file.
    """
    if len(text.encode(errors="replace")) > MOST_VALUE:
        most = f"{MOST_VALUE // 1024} KiB"
        raise UsageError(
            f"a value of {len(text):,} characters, {text[:40]!r}..., is longer than {most}",
            fix="shorten it; of a list of files, join some",
        )
    try:
        _refuse_characters(text)
    except _Refused as error:
        raise UsageError(f"{error}, found in {text[:40]!r}", fix=error.fix) from None
    try:
        return _parse(text)[0]
    except _Refused:
        return text


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise UsageError(f"config file {path} does not exist", fix="check the path") from None
    except IsADirectoryError:
        raise UsageError(f"config file {path} is a folder", fix="give the file in it") from None
    except ValueError as error:
        raise UsageError(f"config file {str(path)!r}: {error}", fix="check the path") from None
    except OSError as error:
        raise DiskError(f"cannot read {path}: {error.strerror}") from None
    if len(content) > MOST_BYTES:
        most = f"{MOST_BYTES // 1024} KiB"
        raise UsageError(
            f"{path} has more than {most}, which no config has",
            fix="give a config; data goes to --data",
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise _Refused(
            f"byte {content[error.start]:#04x} is not UTF-8", line, "save it as UTF-8"
        ) from None


def _parse(text: str) -> tuple[Any, dict[str, int]]:
    _refuse_characters(text)
    lines: dict[str, int] = {}
    try:
        # This loader resolves nothing: every scalar is text, and every tag was written.
        events = iter(yaml.parse(text, Loader=yaml.BaseLoader))
        next(events)
        if isinstance(next(events), yaml.StreamEndEvent):
            return None, lines
        value = _value(next(events), events, "", lines)
        next(events)
        after = next(events)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = f"not valid YAML: {error.problem or error.context}"[:200]
        is_tab = "\\t" in problem
        fix = "indent with spaces, not tabs" if is_tab else "check indentation, quotes, brackets"
        raise _Refused(problem, mark.line + 1 if mark else 1, fix) from None
    if not isinstance(after, yaml.StreamEndEvent):
        raise _Refused("a second document begins here", _line(after), "keep one of them")
    return value, lines


def _refuse_characters(text: str) -> None:
    found = yaml.reader.Reader.NON_PRINTABLE.search(text)
    if found:
        character = f"character {ord(found[0]):#06x} is not allowed"
        raise _Refused(character, text.count("\n", 0, found.start()) + 1, "delete it")


def _value(event: Any, events: Iterator[Any], key: str, lines: dict[str, int]) -> Any:
    """The value that begins with an event; its keys go to `lines`."""
    if isinstance(event, yaml.AliasEvent):
        raise _Refused(
            f"an alias stands here, *{str(event.anchor)[:60]}", _line(event), "write it out"
        )
    if event.tag is not None:
        raise _Refused(f"the tag {event.tag[:60]} is not allowed", _line(event), "leave it out")
    if key.count(".") + key.count("[") > _MOST_LEVELS:
        raise _Refused("values are nested too deeply", _line(event), "a config has two levels")
    if isinstance(event, yaml.MappingStartEvent):
        return _mapping(events, key, lines)
    if isinstance(event, yaml.SequenceStartEvent):
        items: list[Any] = []
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            items.append(_value(event, events, f"{key}[{len(items)}]", lines))
        return items
    return _scalar(event)


def _mapping(events: Iterator[Any], prefix: str, lines: dict[str, int]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    while not isinstance(event := next(events), yaml.MappingEndEvent):
        line = _line(event)
        if not isinstance(event, yaml.ScalarEvent) or event.tag is not None:
            raise _Refused("a key has structure or a tag, expected a name", line, "quote it")
        name = _text_of(event)
        key = f"{prefix}.{name}" if prefix else name
        if key in lines:
            first = f"first in line {lines[key]}"
            raise _Refused(f"key {key[:60]!r} stands twice ({first})", line, "keep one of them")
        lines[key] = line
        values[name] = _value(next(events), events, key, lines)
    return values


def _scalar(event: yaml.ScalarEvent) -> Any:
    text = _text_of(event)
    if event.style is not None:
        return text
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _NOT_FINITE.fullmatch(text):
        return float(text.replace(".", ""))
    return float(text) if _NUMBER.fullmatch(text) else text


def _text_of(event: yaml.ScalarEvent) -> str:
    """The text of a scalar; JSON writes a character beyond 16 bits as two escapes."""
    try:
        text = event.value.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        problem = "an escape stands for half a character"
        raise _Refused(problem, _line(event), "write it whole") from None
    if "\0" in text:
        raise _Refused("an escape stands for the character NUL", _line(event), "delete it")
    return text


def _line(event: Any) -> int:
    return event.start_mark.line + 1
