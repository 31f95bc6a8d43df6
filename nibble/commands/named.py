"""Adapters of the command line: a folder, or name=folder."""

import re
from collections.abc import Sequence
from pathlib import Path

from nibble.errors import UsageError

UNNAMED = "adapter"
_NAMED = re.compile(r"([\w.-]+)=(.+)")


def named_adapters(values: Sequence[str]) -> dict[str, str]:
    """The folder of each name, in order; one folder may come without a name.

    Raises:
        UsageError: If two have the same name, or one is called as the base is.

    >>> named_adapters(["law=runs/law/adapter", "runs/first/adapter"])
    {'law': 'runs/law/adapter', 'adapter': 'runs/first/adapter'}
    """
    found: dict[str, str] = {}
    for value in values:
        match = None if Path(value).exists() else _NAMED.fullmatch(value)
        name, folder = match.groups() if match else (UNNAMED, value)
        if name in found or name == "base":
            raise UsageError(
                f"--adapter {value}: the name {name!r} is taken", fix="give names: --adapter a=DIR"
            )
        found[name] = folder
    return found
