"""YAML as a config file needs it: strict, with the line of every key.

Of YAML's many ways to write a thing only the plain ones count. Numbers are decimal; yes, 010,
1:30 and 2024-01-01 are text. Aliases and tags are refused, so no file can grow when it is read.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from nibble.errors import DiskError, UsageError

# The parser takes up to ten seconds a megabyte; a config has a kilobyte.
MOST_BYTES = 64 * 1024
_MOST_BRACKETS = 20
_WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,99})")
_NUMBER = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map")}


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
    try:
        values, lines = _parse(_text(path))
    except _Refused as error:
        raise UsageError(f"{path}:{error.line}: {error}", fix=error.fix) from None
    if values is None:
        return {}, {}
    if not isinstance(values, dict):
        raise UsageError(
            f"{path}:1: holds {type(values).__name__}, expected sections and keys",
            fix="write a section, such as `optim:`, and its keys below it",
        )
    return values, lines


def parse_value(text: str) -> Any:
    """One value as YAML reads it; text that is no YAML stays text.

    Raises:
        UsageError: If there is a control character in it.
    """
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
    _refuse_brackets(text)
    lines: dict[str, int] = {}
    try:
        # This loader resolves nothing: every scalar is text, and every tag was written.
        node = yaml.compose(text, Loader=yaml.BaseLoader)
        return None if node is None else _value(node, "", lines, set()), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = f"not valid YAML: {error.problem or error.context}"[:200]
        is_tab = "\\t" in problem
        fix = "indent with spaces, not tabs" if is_tab else "check indentation, quotes, brackets"
        raise _Refused(problem, mark.line + 1 if mark else 1, fix) from None
    except RecursionError:
        raise _Refused("values are nested too deeply", 1, "a config has sections only") from None


def _refuse_characters(text: str) -> None:
    found = yaml.reader.Reader.NON_PRINTABLE.search(text)
    if found:
        character = f"character {ord(found[0]):#06x} is not allowed"
        raise _Refused(character, text.count("\n", 0, found.start()) + 1, "delete it")


def _refuse_brackets(text: str) -> None:
    """Brackets in brackets take the parser seconds."""
    depth = 0
    for found in re.finditer(r"[\[\]{}]", text):
        depth = depth + 1 if found[0] in "[{" else max(0, depth - 1)
        if depth > _MOST_BRACKETS:
            line = text.count("\n", 0, found.start()) + 1
            raise _Refused(
                f"{depth} brackets are open, {_MOST_BRACKETS} at most are allowed",
                line,
                "close or quote them",
            )


def _value(node: yaml.Node, key: str, lines: dict[str, int], seen: set[int]) -> Any:
    """The value of a node, whose keys go to `lines`; `seen` are the nodes that were met."""
    line = node.start_mark.line + 1
    if id(node) in seen:
        raise _Refused("an alias repeats the value that begins here", line, "write it out twice")
    seen.add(id(node))
    if node.tag not in _TAGS:
        raise _Refused(f"the tag {node.tag[:60]} is not allowed", line, "leave it out")
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, key, lines, seen)
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, f"{key}[{i}]", lines, seen) for i, item in enumerate(node.value)]
    return _scalar(node) if isinstance(node, yaml.ScalarNode) else None


def _mapping(
    node: yaml.MappingNode, prefix: str, lines: dict[str, int], seen: set[int]
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name_node, value_node in node.value:
        line = name_node.start_mark.line + 1
        if not isinstance(name_node, yaml.ScalarNode):
            raise _Refused("a key is a list or a mapping, expected a name", line, "quote it")
        name = _text_of(name_node)
        key = f"{prefix}.{name}" if prefix else name
        if key in lines:
            first = f"first in line {lines[key]}"
            raise _Refused(f"key {key[:60]!r} stands twice ({first})", line, "keep one of them")
        lines[key] = line
        values[name] = _value(value_node, key, lines, seen)
    return values


def _scalar(node: yaml.ScalarNode) -> Any:
    text = _text_of(node)
    if node.style is not None:
        return text
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _NOT_FINITE.fullmatch(text):
        return float(text.replace(".", ""))
    return float(text) if _NUMBER.fullmatch(text) else text


def _text_of(node: yaml.Node) -> str:
    """The text of a scalar; JSON writes a character beyond 16 bits as two escapes."""
    line = node.start_mark.line + 1
    try:
        text = node.value.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise _Refused("an escape stands for half a character", line, "write it whole") from None
    if "\0" in text:
        raise _Refused("an escape stands for the character NUL", line, "delete it")
    return text
