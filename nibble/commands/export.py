"""`nibble export`: an adapter for llama.cpp, Ollama or vLLM, and for the hub."""

from pathlib import Path
from typing import Annotated, Any

import typer

from nibble.commands import progress
from nibble.units import size


def export(
    target: Annotated[str, typer.Argument(help="gguf, ollama or vllm.")],
    adapter: Annotated[Path, typer.Option(help="Adapter folder.")],
    out: Annotated[Path, typer.Option(help="Folder to write to.")],
    merged: Annotated[
        Path | None, typer.Option(help="Folder of `nibble merge`; gguf, ollama: model.gguf of it.")
    ] = None,
    model: Annotated[str, typer.Option(help="The base, where the adapter names another.")] = "",
    dtype: Annotated[str, typer.Option(help="Of model.gguf: auto, f32, f16, bf16.")] = "auto",
    push: Annotated[str, typer.Option(help="Upload to owner/name on the hub, private.")] = "",
    public: Annotated[bool, typer.Option(help="Make a new repository public.")] = False,
    dry_run: Annotated[bool, typer.Option(help="List what --push would upload.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write what the server accepts, print the line that serves it; refuse what it would not."""
    from nibble.adapter.limits import TARGETS
    from nibble.errors import UsageError, did_you_mean

    if target not in TARGETS:
        fix = did_you_mean(target, TARGETS) or f"use one of {', '.join(TARGETS)}"
        raise UsageError(f"unknown target {target!r}", fix=fix)
    if dtype not in ("auto", "f32", "f16", "bf16"):
        raise UsageError(f"--dtype is {dtype!r}, expected auto, f32, f16 or bf16")
    if (dry_run or public) and not push:
        raise UsageError("--dry-run and --public need --push", fix="add --push owner/name")

    from nibble.adapter import push as hub
    from nibble.adapter.export import export as write

    if push:
        hub.check_repository(push)
    with progress.working(f"writing {out}"):
        made = write(target, adapter, out, merged=merged, model=model, dtype=dtype)
    report: dict[str, Any] = {
        "folder": str(made.folder),
        "files": {path.name: path.stat().st_size for path in made.files},
        "command": made.command,
        "notes": made.notes,
    }
    if push:
        files = hub.files_to_push(out)
        report["push"] = {path.name: path.stat().st_size for path in files}
        if not dry_run:
            with progress.working(f"uploading to {push}"):
                report["address"] = hub.push(files, push, is_public=public)
    if as_json:
        typer.echo(progress.to_json(report))
        return
    _show(report, push)


def _show(report: dict[str, Any], push: str) -> None:
    for name, num_bytes in report["files"].items():
        typer.echo(f"{name:<28}{size(num_bytes):>12}")
    for note in report["notes"]:
        typer.echo(f"note: {note}", err=True)
    if push:
        verb = "uploaded to" if "address" in report else "would be uploaded to"
        typer.echo(f"{verb} {report.get('address', push)}:")
        for name, num_bytes in report["push"].items():
            typer.echo(f"  {name:<26}{size(num_bytes):>12}")
    typer.echo(report["command"])
