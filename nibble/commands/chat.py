"""`nibble chat`: talk to a base, an adapter, or both side by side."""

import sys
from typing import Annotated, Any

import typer


def chat(
    model: Annotated[str, typer.Option(help="Hub id or local folder.")],
    adapter: Annotated[str, typer.Option(help="Adapter folder.")] = "",
    compare: Annotated[bool, typer.Option(help="Answer with the base beside the adapter.")] = False,
    method: Annotated[str, typer.Option(help="lora: 16-bit base; qlora: 4-bit base.")] = "lora",
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 256,
    seed: Annotated[int, typer.Option(help="Of the draw above temperature 0.")] = 0,
) -> None:
    """Chat in the terminal; an empty line or Ctrl-D ends it."""
    from nibble.errors import UsageError

    if method not in ("lora", "qlora"):
        raise UsageError(f"--method is {method!r}, expected lora or qlora")
    if compare and not adapter:
        raise UsageError("--compare needs an adapter", fix="give --adapter DIR")

    from nibble.adapter.format import read_adapter
    from nibble.model.adapt import updates_off
    from nibble.model.load import load_base
    from nibble.serve.generate import generate

    base, tokenizer = load_base(model, "nf4" if method == "qlora" else "bf16")
    if adapter:
        read_adapter(base, adapter)
    settings: dict[str, Any] = {
        "temperature": temperature,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
    }
    history: list[dict[str, str]] = []
    while question := _ask():
        history.append({"role": "user", "content": question})
        if compare:
            with updates_off(base):
                typer.echo("base:    " + generate(base, tokenizer, history, **settings))
            typer.echo("adapter: ", nl=False)
        answer = generate(base, tokenizer, history, on_text=_show, **settings)
        typer.echo()
        history.append({"role": "assistant", "content": answer})


def _ask() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


def _show(text: str) -> None:
    typer.echo(text, nl=False)
    sys.stdout.flush()
