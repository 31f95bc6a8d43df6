"""`nibble compare`: the same work by LoRA, QLoRA and full fine-tuning, measured here."""

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nibble.commands import progress
from nibble.environment import quick_imports

if TYPE_CHECKING:
    from nibble.experiment.compare import Comparison, Progress, Record


def compare(
    recipe: Annotated[Path | None, typer.Argument(help="YAML file; flags override it.")] = None,
    model: Annotated[str, typer.Option(help="Hub id or local folder.")] = "",
    data: Annotated[list[str] | None, typer.Option(help="Training examples.")] = None,
    eval_data: Annotated[str, typer.Option(help="Held-out examples, or a fraction.")] = "",
    methods: Annotated[str, typer.Option(help="Some of lora, qlora, full.")] = "lora,qlora,full",
    seeds: Annotated[int, typer.Option(help="Runs of each method.")] = 3,
    out: Annotated[str, typer.Option(help="Folder of the runs and the report.")] = "",
    general_data: Annotated[str, typer.Option(help="What may be forgotten: a data file.")] = "",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="section.key=value, or METHOD:section.key=value for one."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Train the same work by several methods and report what each costs and brings.

    Running the same command again goes on where it was stopped. A method that does not fit is
    reported as such. Exit code of the first run that failed, 78 where nothing fits.
    """
    from nibble.errors import UsageError

    if not out:
        raise UsageError("--out is not set", fix="name a folder for the runs and the report")
    flags = {"model.name": model, "data.eval": eval_data}
    words = [*progress.overrides(flags, data), *(set_ or [])]

    from nibble.train.interrupt import stop_signals

    with stop_signals() as stop:
        stop.standing = f"what is finished stands in {out}"
        with quick_imports():
            from nibble.experiment.compare import read_comparison

        names = [name.strip() for name in methods.split(",") if name.strip()]
        comparison = read_comparison(
            recipe, words, methods=names, num_seeds=seeds, general=general_data
        )
        code = _run(comparison, Path(out), as_json)
    if code:
        raise typer.Exit(code)


def _run(comparison: "Comparison", place: Path, as_json: bool) -> int:
    """Run, report, and give the exit code."""
    from nibble.experiment.compare import compare as run_all
    from nibble.experiment.render import print_page
    from nibble.experiment.write import to_values, write_report

    with RunsBar(comparison) as bar:
        records = run_all(comparison, place, bar, measure=bar.measure)
    report = _report(comparison, place, records)
    page = write_report(report, place)
    if as_json:
        typer.echo(progress.to_json(to_values(report, page)))
    else:
        from rich.console import Console

        console = Console(highlight=False)
        if not console.is_terminal:
            console = Console(highlight=False, width=160)
        print_page(page, console)
        typer.echo(f"\nreport  {place / 'report.html'}", err=True)
    return _exit_code(list(records.values()))


def _report(comparison: "Comparison", place: Path, records: dict[Any, "Record"]) -> Any:
    import torch

    from nibble.experiment.figures import read_runs
    from nibble.experiment.project import project
    from nibble.experiment.report import build_report
    from nibble.kernels.library import paths

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with progress.working("planning the same work on other GPUs"):
        devices = project(comparison, place)
    runs = read_runs(place, records)
    return build_report(comparison, records, runs, devices=devices, kernels=paths(device))


def _exit_code(records: list["Record"]) -> int:
    from nibble.errors import DoesNotFitError

    failed = next((record.exit_code for record in records if record.is_failed), 0)
    fits = any(record.is_finished for record in records)
    return failed or (0 if fits else DoesNotFitError.exit_code)


class RunsBar:
    """Shows on stderr which run is at work; plain lines where that is no terminal."""

    def __init__(self, comparison: "Comparison") -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._console = Console(stderr=True, highlight=False)
        self._steps = next(iter(comparison.runs.values())).train.steps
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        num_runs = len(comparison.runs) * comparison.num_seeds
        self._task = self._bar.add_task("starting", total=num_runs, numbers="")

    def __enter__(self) -> "RunsBar":
        self._bar.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._bar.stop()

    def measure(self, out: Path, general: str) -> dict[str, Any]:
        """Measure a finished run, and say that it goes on."""
        from nibble.experiment.measure import measure

        self._bar.update(self._task, description=f"measuring {out.name}", numbers="")
        return measure(out, general)

    def __call__(self, at: "Progress") -> None:
        with suppress(OSError):  # nobody may be reading any more; the runs go on
            self._show(at)

    def _show(self, at: "Progress") -> None:
        record = at.record
        share = 0.0 if not self._steps else at.step / self._steps
        done = at.number if record is not None else at.number - 1 + share
        numbers = f"run {at.number} of {at.num_runs}" + (f", step {at.step}" if at.step else "")
        self._bar.update(self._task, description=at.name, completed=done, numbers=numbers)
        if record is not None:
            told = record.reason or "finished"
            seconds = "" if record.seconds is None else f" ({record.seconds:.0f} s)"
            self._console.print(f"{at.name}: {told}{seconds}", markup=False)
        elif not at.step and not self._console.is_terminal:
            self._console.print(f"{at.name}: run {at.number} of {at.num_runs} begins")
