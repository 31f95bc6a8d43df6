"""`nibble demo`: the main job on a bundled tiny base, offline."""

from typing import Annotated

import typer


def demo(
    out: Annotated[str, typer.Option(help="Folder of the two runs.")] = "",
) -> None:
    """Train LoRA and QLoRA on a tiny base and show what each learnt (about a minute)."""
    from nibble.demo.run import run_demo

    run_demo(out)
