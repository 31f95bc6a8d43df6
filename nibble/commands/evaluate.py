"""`nibble eval`: held-out loss of a base or an adapter."""

from dataclasses import asdict
from typing import Annotated

import typer

from nibble.commands import progress


def evaluate(
    model: Annotated[str, typer.Option(help="Hub id or local folder.")],
    data: Annotated[str, typer.Option(help="Examples to measure on.")],
    adapter: Annotated[str, typer.Option(help="Adapter folder.")] = "",
    method: Annotated[str, typer.Option(help="lora: 16-bit base; qlora: 4-bit base.")] = "lora",
    set_: Annotated[list[str] | None, typer.Option("--set", help="section.key=value")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print loss, perplexity and token accuracy on examples."""
    from nibble.config import load_config

    quoted = [
        f"{k}={progress.to_json(v)}" for k, v in {"model.name": model, "data.train": data}.items()
    ]
    run = load_config(None, [*quoted, f"method={method}", *(set_ or [])])

    from nibble.adapter.format import read_adapter
    from nibble.data.dataset import build_dataset
    from nibble.data.loader import eval_batches
    from nibble.model.load import load_base
    from nibble.train.evaluate import EVAL_TOKENS
    from nibble.train.evaluate import evaluate as measure

    storage = run.quant.type if run.method == "qlora" else "bf16"
    if run.model.dtype == "float32" and storage == "bf16":
        storage = "float32"
    base, tokenizer = load_base(model, storage, quant=run.quant.model_dump(exclude={"type"}))
    if adapter:
        read_adapter(base, adapter)
    section = run.data.model_copy(update={"packing": False, "eval": None})
    dataset = build_dataset(section, tokenizer, seed=0)
    end = measure(base, eval_batches(dataset.train, max_tokens=EVAL_TOKENS))
    values = {k: v for k, v in asdict(end).items() if k not in ("step", "seconds")}
    if as_json:
        typer.echo(progress.to_json(values))
        return
    for name, value in values.items():
        typer.echo(
            f"{name:18} {value:,.4f}" if isinstance(value, float) else f"{name:18} {value:,}"
        )
