"""Write docs/reference/ from the code: what a reader sees is what the program says of itself.

python tools/make_docs.py            writes
python tools/make_docs.py --check    exits 1 if a page differs from the code
"""

import argparse
import dataclasses
import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main

import nibble
from nibble import errors, events
from nibble.commands.main import app
from nibble.config import describe, keys

REFERENCE = Path(__file__).resolve().parents[1] / "docs" / "reference"
MADE_BY = "<!-- Made by `make docs`. -->\n\n"


def config_page() -> str:
    """Every key of the config: default, range, meaning, effect on memory."""
    lines = ["# Config", "", "One sentence per key; `nibble explain KEY` prints the same.", ""]
    lines += ["| key | default | takes | what it does | memory |", "|---|---|---|---|---|"]
    for key, field in keys().items():
        takes, memory = describe(key)
        lines.append(
            f"| `{key}` | `{json.dumps(field.get_default())}` | {_cell(takes)} "
            f"| {_cell(field.description)} | {_cell(memory)} |"
        )
    return "\n".join(lines) + "\n"


def command_page() -> str:
    """Every verb with its arguments and options."""
    lines = ["# Command line", ""]
    for name, command in _commands("nibble", typer.main.get_command(app)):
        lines += [f"## `{name}`", "", _cell(command.help or ""), ""]
        for parameter in command.params:
            if parameter.name != "help":
                shown = ", ".join(parameter.opts) if parameter.opts[0][0] == "-" else parameter.name
                help_text = getattr(parameter, "help", None) or ""
                lines.append(f"- `{shown}` {_cell(help_text)}".rstrip())
        lines.append("")
    return "\n".join(lines)


def python_page() -> str:
    """Every public name with its signature and docstring."""
    lines = ["# Python", ""]
    for name in nibble.__all__:
        value: Any = getattr(nibble, name)
        if inspect.ismodule(value):
            value = getattr(__import__("nibble.api", fromlist=[name]), name)
        signature = "" if dataclasses.is_dataclass(value) else _signature(value)
        lines += [f"## `nibble.{name}`", "", "```", f"{name}{signature}", ""]
        lines += [inspect.getdoc(value) or "", "```", ""]
    return "\n".join(lines)


def outcome_page() -> str:
    """Exit codes and events."""
    family = inspect.getdoc(errors) or ""
    lines = ["# Exit codes and events", "", "```", family, "```", "", "## Events", ""]
    for kind in events.EVENT_TYPES:
        names = ", ".join(f"`{item.name}`" for item in dataclasses.fields(kind))
        lines += [f"- **{events.event_name(kind)}**: {inspect.getdoc(kind)} {names}"]
    return "\n".join(lines) + "\n"


PAGES = {
    "config.md": config_page,
    "commands.md": command_page,
    "python.md": python_page,
    "outcomes.md": outcome_page,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    is_check = parser.parse_args().check
    stale = []
    REFERENCE.mkdir(parents=True, exist_ok=True)
    for name, make in PAGES.items():
        path, text = REFERENCE / name, MADE_BY + make()
        if is_check and (not path.is_file() or path.read_text(encoding="utf-8") != text):
            stale.append(name)
        elif not is_check:
            path.write_text(text, encoding="utf-8")
    if stale:
        print(f"docs/reference: {', '.join(stale)} differ from the code; run `make docs`")
    return 1 if stale else 0


def _commands(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    if hasattr(command, "commands"):
        for verb, inner in command.commands.items():
            yield from _commands(f"{name} {verb}", inner)
    else:
        yield name, command


def _signature(value: Any) -> str:
    """The signature without memory addresses."""
    return re.sub(r"<function (\S+) at 0x[0-9a-f]+>", r"\1", str(inspect.signature(value)))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")


if __name__ == "__main__":
    sys.exit(main())
