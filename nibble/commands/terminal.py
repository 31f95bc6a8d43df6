"""Lines in and answers out: readline and rich on a terminal, plain text elsewhere."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from nibble.serve.chat import Part

HISTORY_LINES = 1000
# Two answers side by side need so many columns; below, they stand one after the other.
WIDE = 100
_FENCES = ("```", "~~~")


def read_question(prompt: str = "> ", more: str = "... ") -> str:
    """A line, with those after it while one ends in a backslash.

    Raises:
        EOFError: There is no further line.
    """
    lines = [_read_line(prompt)]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        try:
            lines.append(_read_line(more))
        except EOFError:
            break
    return "\n".join(lines).strip()


def _read_line(prompt: str) -> str:
    is_terminal = sys.stdin.isatty()
    if is_terminal and sys.stdout.isatty():
        return input(prompt)
    if is_terminal:
        sys.stderr.write(prompt)
        sys.stderr.flush()
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\r\n")


@contextmanager
def line_history() -> Iterator[list[str]]:
    """Editing of lines, and the lines of earlier chats, where stdin is a terminal.

    What is put into the list is kept in nibble/chat_history of the user's state folder, or not at
    all where NIBBLE_HISTORY is off. A file that cannot be read or written is no error.
    """
    typed: list[str] = []
    if not sys.stdin.isatty():
        yield typed
        return
    path = history_path()
    with suppress(ImportError):
        _prepare_readline(path)
    try:
        yield typed
    finally:
        if path is not None and typed:
            _keep_lines(path, typed)


def _prepare_readline(path: Path | None) -> None:
    import readline

    # A pasted text of several lines is one question.
    readline.parse_and_bind("set enable-bracketed-paste on")
    if path is not None:
        with suppress(OSError):
            readline.read_history_file(path)


def history_path() -> Path | None:
    """Where lines are kept; None where NIBBLE_HISTORY is off."""
    if os.environ.get("NIBBLE_HISTORY", "").lower() in ("off", "0", "false", "no"):
        return None
    state = os.environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(state):
        with suppress(RuntimeError):
            return Path("~/.local/state/nibble/chat_history").expanduser()
        return None
    return Path(state) / "nibble" / "chat_history"


def _keep_lines(path: Path, typed: Sequence[str]) -> None:
    """Add lines to the file, whose oldest ones go where there are too many."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=0o600)
        with path.open("a", encoding="utf-8", errors="replace") as file:
            file.writelines(line + "\n" for line in typed)
        kept = path.read_bytes().splitlines(keepends=True)
        if len(kept) > 2 * HISTORY_LINES:
            path.write_bytes(b"".join(kept[-HISTORY_LINES:]))


def printable(text: str) -> str:
    """The text without characters that a terminal obeys; line ends and tabs stay.

    >>> printable("a\\x1b[31mb\\n")
    'a[31mb\\n'
    """
    return "".join(c for c in text if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160))


def show_answers(parts: Iterable["Part"], names: Sequence[str], console: Console) -> None:
    """Show answers while they grow: Markdown on a terminal, plain text elsewhere.

    Args:
        names: Of those who answer; one alone is not named.
    """
    is_rich = console.is_terminal and not console.is_dumb_terminal
    if not is_rich:
        _show_in_turn(parts, names, _PlainText(console))
    elif len(names) > 1 and console.width >= WIDE:
        _show_beside(parts, names, console)
    else:
        _show_in_turn(parts, names, _Markdown(console))


class _PlainText:
    """Text as it comes."""

    def __init__(self, console: Console) -> None:
        self._file = console.file

    def begin(self, name: str) -> None:
        self._file.write(f"{name}: " if name else "")

    def add(self, text: str) -> None:
        self._file.write(text)
        self._file.flush()

    def end(self) -> None:
        self._file.write("\n")
        self._file.flush()


class _Markdown:
    """Blocks that are whole are printed; the last one is drawn anew while it grows."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._rest = ""
        self._live: Any = None

    def begin(self, name: str) -> None:
        from rich.live import Live

        if name:
            self._console.rule(name, align="left", style="dim")
        self._rest = ""
        self._live = Live(console=self._console, transient=True, refresh_per_second=12)
        self._live.start()

    def add(self, text: str) -> None:
        whole, self._rest = split_blocks(self._rest + text)
        self._live.update(markdown(self._rest))
        if whole.strip():
            self._console.print(markdown(whole))

    def end(self) -> None:
        self._live.stop()
        if self._rest.strip():
            self._console.print(markdown(self._rest))


def _show_in_turn(parts: Iterable["Part"], names: Sequence[str], screen: Any) -> None:
    """One answer after the other; those that come early are held back."""
    held = [""] * len(names)
    is_done = [False] * len(names)
    at = 0

    def begin() -> None:
        screen.begin(names[at] if len(names) > 1 else "")
        screen.add(held[at])

    begin()
    try:
        for part in parts:
            text = printable(part.text)
            held[part.number] += text
            is_done[part.number] |= part.is_last
            if part.number == at:
                screen.add(text)
            while is_done[at] and at + 1 < len(names):
                screen.end()
                at += 1
                begin()
    finally:
        screen.end()


def _show_beside(parts: Iterable["Part"], names: Sequence[str], console: Console) -> None:
    """Answers in columns, printed whole at the end."""
    from rich.live import Live
    from rich.table import Table

    texts = [""] * len(names)

    def table() -> Table:
        columns = Table.grid(expand=True, padding=(0, 2))
        for _ in names:
            columns.add_column(ratio=1)
        columns.add_row(*(f"[dim]{name}[/dim]" for name in names))
        columns.add_row(*map(markdown, texts))
        return columns

    try:
        with Live(console=console, transient=True, refresh_per_second=12) as live:
            for part in parts:
                texts[part.number] += printable(part.text)
                live.update(table())
    finally:
        console.print(table())


def split_blocks(text: str) -> tuple[str, str]:
    """Markdown cut behind its last whole block: after an empty line outside of a fence.

    >>> split_blocks("a\\n\\nb")
    ('a\\n\\n', 'b')
    """
    whole, length, fence = 0, 0, ""
    for line in text.splitlines(keepends=True):
        length += len(line)
        start = line.lstrip()[:3]
        if fence:
            fence = "" if start == fence else fence
        elif start in _FENCES:
            fence = start
        elif line.endswith("\n") and not line.strip():
            whole = length
    return text[:whole], text[whole:]


def markdown(text: str) -> Any:
    """Markdown for a terminal: line ends stay, HTML is text, and links show where they go."""
    from markdown_it import MarkdownIt
    from rich.markdown import Markdown

    shown = Markdown("", hyperlinks=False)
    parser = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    shown.parsed = parser.parse(text)
    for token in shown.parsed:
        for child in token.children or ():
            if child.type == "softbreak":
                child.type = "hardbreak"
    return shown


def teller(console: Console) -> Callable[[str], None]:
    """Says what a command did, apart from answers: dim on a terminal."""

    def tell(text: str) -> None:
        console.print(printable(text), style="dim", markup=False, highlight=False)

    return tell
