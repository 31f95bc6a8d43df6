"""`nibble sweep`: many runs over a grid or a list of settings, packed onto the devices."""

from pathlib import Path
from typing import Annotated, Any

import typer

from nibble.commands import progress
from nibble.commands.board import Board, print_ranking
from nibble.environment import quick_imports


def sweep(
    recipe: Annotated[Path, typer.Argument(help="YAML file that all runs share.")],
    axes: Annotated[
        list[str] | None, typer.Argument(help="More axes, as after --grid.", show_default=False)
    ] = None,
    grid: Annotated[
        list[str] | None, typer.Option(help="key=v1,v2: every combination is a run.")
    ] = None,
    runs: Annotated[
        Path | None, typer.Option(help="Instead of a grid: a YAML list of dotted keys and values.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the sweep.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="section.key=value")] = None,
    on: Annotated[str, typer.Option(help="local: this machine; ray: a Ray cluster.")] = "local",
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Runs at a time on a device; 1 on a CPU, what fits on a GPU."),
    ] = None,
    halving: Annotated[
        bool, typer.Option(help="Leave the worse half behind at 1/4 and 1/2 of the steps.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Train every combination of some settings and name the best; goes on where it was stopped."""
    from nibble.errors import UsageError, did_you_mean

    if on not in ("local", "ray"):
        close = did_you_mean(on, ("local", "ray"))
        raise UsageError(f"--on {on}: expected local or ray", fix=close or "--on local")
    if out is None:
        raise UsageError("--out is missing", fix="name the folder of the sweep: --out sweep")
    trials, rungs = _trials(recipe, [*(grid or []), *(axes or [])], runs, set_ or [], halving)

    from nibble.experiment import record
    from nibble.train.interrupt import stop_signals

    place = out.expanduser().resolve()
    with stop_signals() as stop, record.hold(place):
        known = record.read_record(place, trials, has_halving=halving)
        with quick_imports():
            from nibble.disk import disk_errors
            from nibble.experiment import ranking, sweep
            from nibble.experiment.forecasts import plan_trials
        with _engine(on, workers) as (engine, device):
            with progress.working(f"planning {len(trials)} runs"):
                planned = plan_trials(trials, device, known)
            record.write_record(place, planned, has_halving=halving)
            with Board() as board, disk_errors(f"cannot run the sweep in {place}"):
                rows = sweep.run_sweep(place, planned, engine, rungs=rungs, show=board, stop=stop)
        found = ranking.rank(rows)
        ranking.write_ranking(place, found)
    if as_json:
        typer.echo(progress.to_json(found.to_dict()))
    else:
        print_ranking(found)
    code = sweep.exit_code_of(rows)
    if code:
        raise typer.Exit(code)


def _trials(
    recipe: Path, axes: list[str], runs: Path | None, overrides: list[str], halving: bool
) -> tuple[list[Any], list[int]]:
    """The runs and the rungs, checked before the large libraries are imported."""
    from nibble.errors import UsageError
    from nibble.experiment.grid import grid_trials, listed_trials
    from nibble.experiment.halving import with_rungs

    if runs is not None and axes:
        raise UsageError("--grid and --runs exclude each other", fix="give one of them")
    if runs is not None:
        trials = listed_trials(recipe, runs, overrides)
    else:
        trials = grid_trials(recipe, axes, overrides)
    return with_rungs(trials) if halving else (trials, [])


def _engine(on: str, workers: int | None) -> Any:
    """A context that gives the engine, and the device that runs are planned for."""
    if on == "ray":
        from nibble.experiment.ray_engine import connected

        return connected(workers)
    from contextlib import nullcontext

    from nibble.experiment.machine import this_machine

    return nullcontext(this_machine(workers))
