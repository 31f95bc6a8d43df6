"""What a person sees while a run goes on: a bar, lines for evaluations, warnings."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nibble.events import EvalEnd, Event, LoadEnd, PlanMade, RunStart, StepEnd, WarningRaised
from nibble.units import size


class TrainingBar:
    """Shows the events of a run on stderr; plain lines where stderr is no terminal."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task: Any = None
        self._steps = 0

    @property
    def has_begun(self) -> bool:
        """Whether a run began while the bar was there."""
        return self._task is not None

    def __enter__(self) -> "TrainingBar":
        self._bar.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._bar.stop()

    def __call__(self, event: Event) -> None:
        with suppress(OSError):  # nobody may be reading any more; the run goes on
            self._show(event)

    def _show(self, event: Event) -> None:
        if isinstance(event, PlanMade):
            for reason in event.reasons:
                self._console.print(f"[dim]plan: {escape(reason)}[/dim]")
        elif isinstance(event, WarningRaised):
            self._console.print(f"[yellow]warning:[/yellow] {escape(event.message)}")
        elif isinstance(event, LoadEnd):
            self._console.print(_load_line(event))
        elif isinstance(event, RunStart):
            self._steps = event.steps
            self._task = self._bar.add_task(
                event.method, total=event.steps, completed=event.steps_done, numbers=""
            )
        elif isinstance(event, EvalEnd):
            self._console.print(
                f"step {event.step}: held-out loss {event.loss:.4f}, "
                f"token accuracy {event.token_accuracy:.3f}"
            )
        elif isinstance(event, StepEnd):
            self._step(event)

    def _step(self, event: StepEnd) -> None:
        numbers = f"loss {event.loss:.4f}  {event.tokens_per_s:,.0f} tokens/s"
        self._bar.update(self._task, completed=event.step, numbers=numbers)
        every = max(1, self._steps // 10)
        if not self._console.is_terminal and event.step % every == 0:
            self._console.print(f"step {event.step} of {self._steps}: {numbers}")


@contextmanager
def working(what: str) -> Iterator[Callable[[str], None]]:
    """Show that something goes on, and what by the function given; nothing without a terminal."""
    console = Console(stderr=True)
    with console.status(what) if console.is_terminal else nullcontext() as status:
        yield (lambda text: status.update(text)) if status is not None else lambda text: None


@contextmanager
def counting(what: str) -> Iterator[Callable[[int], Callable[[int], None]]]:
    """A bar on stderr over so many rows; a line at each tenth where stderr is no terminal.

    with counting("rows") as bar:
        on_done = bar(total)
        on_done(3)                  three more are done
    """
    console = Console(stderr=True, highlight=False)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(
        *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal
    ) as shown:

        def begin(total: int) -> Callable[[int], None]:
            task = shown.add_task(what, total=total)
            done = 0

            def advance(num_more: int) -> None:
                nonlocal done
                tenths = done * 10 // max(1, total)
                done += num_more
                shown.update(task, completed=done)
                if not console.is_terminal and done * 10 // max(1, total) > tenths:
                    console.print(f"{what}: {done:,} of {total:,}")

            return advance

        yield begin


def overrides(flags: Mapping[str, str], data: Sequence[str] | None) -> list[str]:
    """Flags of a command as `section.key=value`; empty ones are left out."""
    found = [f"{key}={_quoted(key, value)}" for key, value in flags.items() if value]
    if data:
        found.append(f"data.train={to_json(data[0] if len(data) == 1 else list(data))}")
    return found


def _quoted(key: str, value: str) -> str:
    """Text as YAML text; held-out data may also be a fraction."""
    try:
        float(value)
    except ValueError:
        return to_json(value)
    return value if key == "data.eval" else to_json(value)


def to_json(values: Any) -> str:
    """One line of JSON; a document gets the version of its form, and NaN becomes null."""
    if isinstance(values, dict):
        values = {"version": 1, **{k: None if v != v else v for k, v in values.items()}}
    return json.dumps(values, ensure_ascii=False)


def _load_line(event: LoadEnd) -> str:
    share = 100 * event.num_trainable / max(1, event.num_total)
    return (
        f"loaded {event.num_total:,} values in {size(event.total_bytes)}; "
        f"training {event.num_trainable:,} of them ({share:.2f} %)"
    )
