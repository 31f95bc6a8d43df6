"""`nibble train`: a recipe or a few flags, a progress bar, a result."""

import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from nibble.commands import progress
from nibble.environment import quick_imports
from nibble.units import size


def train(
    recipe: Annotated[Path | None, typer.Argument(help="YAML file; flags override it.")] = None,
    model: Annotated[str, typer.Option(help="Hub id or local folder.")] = "",
    data: Annotated[list[str] | None, typer.Option(help="Training examples.")] = None,
    eval_data: Annotated[str, typer.Option(help="Held-out examples, or a fraction.")] = "",
    method: Annotated[str, typer.Option(help="lora, qlora, full or auto.")] = "",
    out: Annotated[str, typer.Option(help="Folder of the run.")] = "",
    set_: Annotated[list[str] | None, typer.Option("--set", help="section.key=value")] = None,
    fresh: Annotated[bool, typer.Option(help="Start over; the folder must be empty.")] = False,
    anyway: Annotated[bool, typer.Option(help="Start even if the plan says no.")] = False,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(
            help="Continue though this key, or base, data, rows, tokenizer, template, changed."
        ),
    ] = None,
    devices: Annotated[
        int | None, typer.Option(min=1, help="Processes on this machine, one a device; 1.")
    ] = None,
    serve: Annotated[
        str, typer.Option(help="Refuse what gguf, ollama or vllm would not load afterwards.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train, or continue the run that stands in --out."""
    from nibble.config import check_run, interval_seconds, load_config

    flags: dict[str, Any] = {
        "model.name": model,
        "data.eval": eval_data,
        "method": method,
        "out": out,
    }
    run = load_config(recipe, [*progress.overrides(flags, data), *(set_ or [])])

    # A wrong config or folder is refused before the large libraries are imported.
    check_run(run)
    if serve:
        _check_serving(run, serve)
    from nibble.train import folder, launch
    from nibble.train.interrupt import stop_signals

    is_first = launch.place_here().rank == 0
    target = folder.folder_of(run)
    if fresh and is_first:
        folder.refuse_content(target)
    if devices is not None and launch.is_launcher(devices):
        stop_seconds = interval_seconds(run.train.stop_within, "train.stop_within")
        raise typer.Exit(launch.launch(devices, sys.argv[1:], stop_seconds=stop_seconds))
    with stop_signals(), folder.hold(target) if is_first else nullcontext():
        with quick_imports():
            from nibble import api
        bar = progress.TrainingBar()
        with bar if is_first else nullcontext():
            result = api.train_held(run, bar, anyway=anyway, allow_change=allow_change or ())
    if not is_first:
        return
    if not bar.has_begun:
        typer.echo(f"{target} is finished already; nothing to do", err=True)
    if as_json:
        values = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(result).items()}
        typer.echo(progress.to_json(values))
        return
    is_full = run.method == "full"
    typer.echo(f"{'model' if is_full else 'adapter':<15}{result.adapter}")
    typer.echo(f"training loss  {result.final_loss:.4f}")
    if result.eval_loss is not None:
        typer.echo(f"held-out loss  {result.eval_loss:.4f}")
    typer.echo(f"peak memory    {size(result.peak_memory_bytes)}")
    typer.echo(f"speed          {result.tokens_per_s:,.0f} tokens/s")
    flag = "--model" if is_full else f"--model {run.model.name} --adapter"
    typer.echo(f"try it         nibble chat {flag} {result.adapter}", err=True)


def _check_serving(run: Any, target: str) -> None:
    """Ask before training what `nibble export` will ask after it."""
    from nibble.adapter.limits import Update, check_limits
    from nibble.model.files import find_config

    if run.method == "full":
        return
    values = find_config(run.model.name, run.model.revision)
    has_experts = bool(values.get("num_experts") or values.get("num_local_experts"))
    is_whole = run.lora.target == "all-linear"
    layers = () if is_whole else run.lora.target
    update = Update(run.lora.rank, layers, has_experts and (is_whole or "experts" in layers))
    for note in check_limits(target, update, values["model_type"]):
        typer.echo(f"note: {note}", err=True)
