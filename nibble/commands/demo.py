"""`nibble demo`: the main job on a bundled tiny base, offline."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nibble.commands import progress

if TYPE_CHECKING:
    from nibble.demo.run import Demo


def demo(
    out: Annotated[str, typer.Option(help="Folder of the two runs; must be empty.")] = "",
) -> None:
    """Train LoRA and QLoRA on a tiny base and show what each learnt (under a minute)."""
    from rich.console import Console

    from nibble.demo import BASE_FOLDER
    from nibble.demo.run import run_demo
    from nibble.errors import FolderInUseError

    folder = Path(out or tempfile.mkdtemp(prefix="nibble-demo-"))
    if folder.is_dir() and any(folder.iterdir()):
        raise FolderInUseError(f"{folder} is not empty", fix="choose another --out")
    errors = Console(stderr=True, highlight=False)
    result = run_demo(folder, lambda line: errors.print(f"[bold]{line}[/bold]"))
    console = Console(highlight=False)
    _print_table(console, result)
    _print_answers(console, result)
    adapter = result.learnt[-1].adapter
    console.print(f"\nnext: nibble chat --model {BASE_FOLDER} --adapter {adapter} --compare")
    console.print("      nibble train --model YOUR_MODEL --data YOUR_FILE.jsonl --eval-data 0.05")


def _print_table(console: object, result: "Demo") -> None:
    from rich.table import Table

    table = Table(title="LoRA and QLoRA on the same work")
    for column in ("", *(learnt.method for learnt in result.learnt)):
        table.add_column(column, justify="left" if not column else "right")
    rows = {
        "resident base": lambda x: progress.size(x.base_bytes),
        "peak memory": lambda x: progress.size(x.peak_memory_bytes),
        "seconds per step": lambda x: f"{x.seconds_per_step:.3f}",
        "adapter": lambda x: progress.size(x.adapter_bytes),
        "held-out loss before": lambda x: f"{x.loss_before:.3f}",
        "held-out loss after": lambda x: f"{x.loss_after:.3f}",
        "answers right before": lambda x: f"{x.right_before:.0%}",
        "answers right after": lambda x: f"{x.right_after:.0%}",
        "  in unseen wordings": lambda x: f"{x.right_after_unseen:.0%}",
    }
    for name, cell in rows.items():
        table.add_row(name, *(cell(learnt) for learnt in result.learnt))
    console.print(table)  # type: ignore[attr-defined]


def _print_answers(console: object, result: "Demo") -> None:
    from rich.table import Table

    last = result.learnt[-1]
    table = Table(title="Three held-out letters", show_lines=True)
    for column in ("letter", "base", f"with the {last.method} adapter"):
        table.add_column(column)
    shown = zip(result.letters, last.answers_before, last.answers_after, strict=True)
    for letter, before, after in shown:
        table.add_row(*(text.strip().replace("[", r"\[") for text in (letter, before, after)))
    console.print(table)  # type: ignore[attr-defined]
