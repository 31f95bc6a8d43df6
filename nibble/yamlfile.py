"""YAML as a config file needs it: strict, with the line of every key."""

from pathlib import Path
from typing import Any

import yaml

from nibble.errors import DiskError, UsageError


def read(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The mapping in a YAML file, and the line (from 1) of each dotted key.

    Raises:
        UsageError: If the file is no YAML mapping, or a key stands twice.
        DiskError: If the file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UsageError(f"config file {path} does not exist", fix="check the path") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8: {error}", fix="save it as UTF-8") from None
    except OSError as error:
        raise DiskError(f"cannot read {path}: {error.strerror}") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(
            f"{path} is not valid YAML: {error}", fix="check the indentation"
        ) from None
    if values is None:
        return {}, {}
    if not isinstance(values, dict) or not isinstance(node, yaml.MappingNode):
        raise UsageError(f"{path} holds {type(values).__name__}, expected sections and keys")
    return values, _lines(node, path)


def parse_value(text: str) -> Any:
    """One value as YAML reads it; text that is no YAML stays text."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def write(values: Any) -> str:
    """YAML text with keys in their given order."""
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _lines(node: yaml.MappingNode, path: Path, prefix: str = "") -> dict[str, int]:
    lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        key = f"{prefix}{key_node.value}"
        line = key_node.start_mark.line + 1
        if key in lines:
            raise UsageError(
                f"{path}:{line}: key {key!r} stands twice (first in line {lines[key]})",
                fix="keep one of them",
            )
        lines[key] = line
        if isinstance(value_node, yaml.MappingNode):
            lines.update(_lines(value_node, path, f"{key}."))
    return lines
