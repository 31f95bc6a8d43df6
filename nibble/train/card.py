"""The model card of an adapter."""

from nibble.adapter.card import model_card
from nibble.config import RunConfig
from nibble.events import EvalEnd
from nibble.train.checkpoint import TrainState
from nibble.train.exact import LEVELS


def run_card(run: RunConfig, state: TrainState, last: EvalEnd | None) -> str:
    """README.md: what was trained on what, how, and how well."""
    base = "16-bit" if run.method == "lora" else f"{run.quant.type.upper()} 4-bit"
    rows = [
        ("method", f"{run.method} ({base} base)"),
        ("rank, alpha", f"{run.lora.rank}, {run.lora.alpha:g}"),
        ("data", str(run.data.train)),
        ("steps", f"{state.step} of {run.train.batch_size} rows, {state.tokens:,} tokens"),
        ("learning rate", f"{run.optim.lr:g}, {run.optim.schedule}"),
        ("seed", str(run.train.seed)),
        ("exactness", LEVELS[run.train.exactness]),
    ]
    if last is not None:
        rows.append(("held-out loss", f"{last.loss:.4f} nats per target token"))
        rows.append(("held-out token accuracy", f"{last.token_accuracy:.3f}"))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return model_card(
        run.model.name,
        body=f"# A LoRA adapter for {run.model.name}\n\n| | |\n|---|---|\n{table}\n\n"
        "Trained with nibble. `run.yaml` in the run folder holds every setting.",
    )
