"""`nibble replay`: run a finished run once more, and say whether the same came out."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from nibble.commands import progress
from nibble.environment import quick_imports


def replay(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    out: Annotated[str, typer.Option(help="Folder of the second run; RUN-replay.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Run a finished run once more and compare the weights and figures bit by bit."""
    from nibble.train.interrupt import stop_signals

    run = run.resolve()
    into = Path(out) if out else run.with_name(f"{run.name}-replay")
    with stop_signals():
        with quick_imports():
            from nibble.train.replay import replay as run_again
        with progress.TrainingBar() as bar:
            result = run_again(run, into, bar)
    if as_json:
        typer.echo(progress.to_json(asdict(result)))
        return
    for name, digest in result.sha256.items():
        typer.echo(f"equal   {name}, SHA-256 {digest}")
    typer.echo(f"equal   loss and gradient norm of {result.num_steps} steps")
    if result.num_evals:
        typer.echo(f"equal   held-out loss of {result.num_evals} evaluations")
