"""What a person sees of a sweep: a live table on a terminal, else a line when something happens."""

import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from nibble.experiment.ranking import Ranking
    from nibble.experiment.sweep import Row

_COLOURS = {
    "running": "cyan",
    "finished": "green",
    "failed": "red",
    "does not fit": "yellow",
    "stopped early": "dim",
}
_REFRESH_SECONDS = 0.5
# Lines that a run writes about its steps where there is no terminal.
_LINES_PER_RUN = 4
# A column of text is folded to so many characters at most; columns stand so far apart.
_LEAST_TEXT = 8
_GAP = 2
# What a narrow terminal does without, first of all the device.
_LIVE_GOES_FIRST = ("device", "left", "settings", "step", "state")


class Board:
    """Shows the rows of a sweep on stderr."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._is_live = self._console.is_terminal
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._shown_at = 0.0
        self._said: dict[str, Any] = {}

    def __enter__(self) -> "Board":
        if self._is_live:
            self._live.start()
        return self

    def __exit__(self, *details: object) -> None:
        if self._is_live:
            self._live.stop()

    def __call__(self, rows: "Sequence[Row]") -> None:
        with suppress(OSError):  # nobody may be reading any more; the sweep goes on
            if self._is_live:
                self._refresh(rows)
            else:
                self._say(rows)

    def _refresh(self, rows: "Sequence[Row]") -> None:
        if time.monotonic() - self._shown_at >= _REFRESH_SECONDS:
            self._shown_at = time.monotonic()
            size = self._console.size
            self._live.update(_live_table(rows, size.height, size.width), refresh=True)

    def _say(self, rows: "Sequence[Row]") -> None:
        for row in rows:
            followed = row.followed
            every = max(1, followed.steps // _LINES_PER_RUN)
            now = (row.state, row.reason, followed.step // every if row.state == "running" else 0)
            before, self._said[row.name] = self._said.get(row.name), now
            if before != now and (before is not None or row.state != "waiting"):
                self._console.print(escape(_line(row)), soft_wrap=True)


def _line(row: "Row") -> str:
    """A run in one line, where nothing moves on the screen."""
    from nibble.experiment.grid import said

    followed, start = row.followed, f"{row.name} {row.state}"
    if row.state == "running" and not followed.step:
        return f"{start} on {row.place or 'a device'}: {said(row.planned.trial.settings)}"
    losses = _number(followed.loss, "loss ") + _number(followed.eval_loss, ", held-out loss ")
    if row.state == "running":
        return f"{row.name} step {followed.step} of {followed.steps}: {losses}"
    return f"{start}: {row.reason or losses or 'nothing yet'}"


def _live_table(rows: "Sequence[Row]", height: int, width: int) -> Table:
    """The rows that fit the screen: those at work first, then what waits, then what is done."""
    from nibble.experiment.grid import said

    order = {"running": 0, "paused": 1, "waiting": 2}
    room = max(3, height - 5)
    shown = sorted(rows, key=lambda row: order.get(row.state, 3))[:room]
    num_done = sum(row.state in ("finished", "stopped early") for row in rows)
    more = f", {len(rows) - len(shown)} more below" if len(rows) > len(shown) else ""
    lines = []
    for row in sorted(shown, key=lambda row: row.name):
        followed, colour = row.followed, _COLOURS.get(row.state, "default")
        state = f"{row.state}: {row.reason}" if row.reason else row.state
        left = followed.seconds_left if row.state == "running" else None
        line = {
            "run": row.name,
            "settings": escape(said(row.planned.trial.settings)),
            "device": row.place,
            "state": f"[{colour}]{escape(state)}[/{colour}]",
            "step": f"{followed.step}/{followed.steps}" if followed.steps else "",
            "loss": _number(followed.loss),
            "held-out": _number(followed.eval_loss),
            "left": "" if left is None else _clock(left),
        }
        lines.append((line, ""))
    table = _table(lines, ("settings", "device", "state"), _LIVE_GOES_FIRST, width)
    table.title, table.title_justify = f"{num_done} of {len(rows)} runs done{more}", "left"
    return table


def print_ranking(ranking: "Ranking") -> None:
    """The table of results, the best run and its adapter, on stdout."""
    console = Console(highlight=False)
    keys = list(dict.fromkeys(key for result in ranking.results for key in result.settings))
    lines = []
    for result in ranking.results:
        own = {key: _plain(result.settings.get(key, "")) for key in keys}
        state = f"{result.state}: {result.reason}" if result.reason else result.state
        line = {
            "run": result.name,
            **{key: escape(value) for key, value in own.items()},
            "held-out loss": _number(result.eval_loss),
            "training loss": _number(result.train_loss),
            "steps": str(result.steps) if result.steps else "",
            "time": "" if result.seconds is None else _clock(result.seconds),
            "state": escape(state),
        }
        lines.append((line, "bold" if result.name == ranking.winner else ""))
    goes_first = ["time", "steps", *_other_loss(ranking.by), *reversed(keys), "state"]
    console.print(_table(lines, (*keys, "state"), goes_first, console.width))
    for note in ranking.notes:
        console.print(escape(note), soft_wrap=True)
    if ranking.winner:
        best = ranking.named(ranking.winner)
        console.print(f"\nbest     {best.name}", soft_wrap=True)
        console.print(f"adapter  {escape(best.adapter)}", soft_wrap=True)


def _other_loss(by: str) -> list[str]:
    """The column of the loss that does not decide."""
    return ["training loss" if by == "eval_loss" else "held-out loss"]


def _table(
    lines: Sequence[tuple[Mapping[str, str], str]],
    texts: Collection[str],
    goes_first: Sequence[str],
    width: int,
) -> Table:
    """A table of so many characters: columns go before a number is cut.

    Args:
        lines: The cells by the name of their column, in markup, and the style of each line.
        texts: The columns that may be folded.
        goes_first: What can be missing, in this order.
    """
    header = {name: name for name in lines[0][0]}
    least = _least_widths(lines, header, texts)
    if sum(least.values()) > width:
        header = {name: name.replace(" ", "\n") for name in header}
        least = _least_widths(lines, header, texts)
    for name in goes_first:
        if sum(least.values()) > width:
            del least[name]
    table = Table(box=None)
    for name in least:
        if name in texts:
            table.add_column(name, overflow="fold")
        else:
            justify = "left" if name == "run" else "right"
            table.add_column(header[name], justify=justify, no_wrap=True)
    for line, style in lines:
        table.add_row(*(line[name] for name in least), style=style)
    return table


def _least_widths(
    lines: Sequence[tuple[Mapping[str, str], str]],
    header: Mapping[str, str],
    texts: Collection[str],
) -> dict[str, int]:
    """The characters that a column takes at least, with the gap beside it."""
    least: dict[str, int] = {}
    for name, said in header.items():
        cells = [Text.from_markup(line[name]).cell_len for line, _ in lines]
        widest = max([*cells, *map(len, said.splitlines())])
        least[name] = _GAP + (min(widest, _LEAST_TEXT) if name in texts else widest)
    return least


def _plain(value: Any) -> str:
    import json

    return value if isinstance(value, str) else json.dumps(value)


def _number(value: float | None, before: str = "") -> str:
    return "" if value is None else f"{before}{value:.4f}"


def _clock(seconds: float) -> str:
    """A time as a clock shows it.

    >>> _clock(3725), _clock(59)
    ('1:02:05', '0:59')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
