"""What a person sees of a sweep: a live table on a terminal, else a line when something happens."""

import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

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
            self._live.update(_live_table(rows, self._console.height), refresh=True)

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


def _live_table(rows: "Sequence[Row]", height: int) -> Table:
    """The rows that fit the screen: those at work first, then what waits, then what is done."""
    from nibble.experiment.grid import said

    order = {"running": 0, "paused": 1, "waiting": 2}
    room = max(3, height - 5)
    shown = sorted(rows, key=lambda row: order.get(row.state, 3))[:room]
    num_done = sum(row.state in ("finished", "stopped early") for row in rows)
    more = f", {len(rows) - len(shown)} more below" if len(rows) > len(shown) else ""
    table = Table(
        title=f"{num_done} of {len(rows)} runs done{more}", title_justify="left", box=None
    )
    for name in ("run", "settings", "device", "state"):
        table.add_column(name, overflow="fold")
    for name in ("step", "loss", "held-out", "left"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in sorted(shown, key=lambda row: row.name):
        followed, colour = row.followed, _COLOURS.get(row.state, "default")
        state = f"{row.state}: {row.reason}" if row.reason else row.state
        left = followed.seconds_left if row.state == "running" else None
        table.add_row(
            row.name,
            escape(said(row.planned.trial.settings)),
            row.place,
            f"[{colour}]{escape(state)}[/{colour}]",
            f"{followed.step}/{followed.steps}" if followed.steps else "",
            _number(followed.loss),
            _number(followed.eval_loss),
            "" if left is None else _clock(left),
        )
    return table


def print_ranking(ranking: "Ranking") -> None:
    """The table of results, the best run and its adapter, on stdout."""
    console = Console(highlight=False)
    keys = list(dict.fromkeys(key for result in ranking.results for key in result.settings))
    table = Table(box=None)
    table.add_column("run", no_wrap=True)
    for key in keys:
        table.add_column(key, overflow="fold")
    for name in ("held-out loss", "training loss", "steps", "time"):
        table.add_column(name, justify="right")
    table.add_column("state", overflow="fold")
    for result in ranking.results:
        own = [_plain(result.settings[key]) if key in result.settings else "" for key in keys]
        state = f"{result.state}: {result.reason}" if result.reason else result.state
        is_best = result.name == ranking.winner
        table.add_row(
            result.name,
            *map(escape, own),
            _number(result.eval_loss),
            _number(result.train_loss),
            str(result.steps) if result.steps else "",
            "" if result.seconds is None else _clock(result.seconds),
            escape(state),
            style="bold" if is_best else "",
        )
    console.print(table)
    for note in ranking.notes:
        console.print(escape(note), soft_wrap=True)
    if ranking.winner:
        best = ranking.named(ranking.winner)
        console.print(f"\nbest     {best.name}", soft_wrap=True)
        console.print(f"adapter  {escape(best.adapter)}", soft_wrap=True)


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
