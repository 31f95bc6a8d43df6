"""What a finished run is measured on beside its own events: answers, and what it forgot."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from nibble.adapter.format import read_adapter
from nibble.config import DataConfig, RunConfig
from nibble.data.dataset import build_dataset
from nibble.data.loader import eval_batches
from nibble.data.packing import Row
from nibble.errors import DataError
from nibble.model.adapt import updates_off
from nibble.model.load import load_base
from nibble.train import folder
from nibble.train.build import base_options
from nibble.train.evaluate import EVAL_TOKENS, evaluate
from nibble.train.loss import token_metrics

GENERAL_FILE = Path(__file__).with_name("general.txt")
# Tokens of an answer that is either right or wrong as a whole, its end included.
SHORT_TOKENS = 32
# Of the held-out rows with such answers, the first so many.
MOST_ROWS = 100


@dataclass(frozen=True)
class Measured:
    """What was measured of the result of a run.

    Attributes:
        num_short: Held-out rows with short answers that were answered.
        num_exact: Of these, how many greedily and without a mistake; in a row of several turns
            each goes on from the true ones before it.
        general_before: Loss on the general text in nats per token, of the base as it is stored.
        general_after: The same after training.
        num_general_tokens: Tokens of that loss.
    """

    num_short: int
    num_exact: int
    general_before: float
    general_after: float
    num_general_tokens: int


def measure(out: Path, general: str = "") -> dict[str, Any]:
    """`Measured` of a finished run, as plain values.

    Args:
        out: The folder of the run.
        general: A data file; "" is the bundled text.

    Raises:
        DataError: If the general text cannot be used.
        NibbleError: If the base or the result of the run cannot be read.
    """
    run = folder.read_run(out)
    if run is None:
        raise DataError("there is no run", path=str(out), fix="run the comparison again")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if run.method == "full":
        after, tokenizer = load_base(str(out / "model"), device=device)
        base, _ = load_base(run.model.name, revision=run.model.revision, device=device)
        rows = _general_rows(run, tokenizer, general)
        before = _loss(base, rows, device)
        del base
    else:
        after, tokenizer = load_base(
            run.model.name, revision=run.model.revision, device=device, **base_options(run)
        )
        read_adapter(after, out / "adapter")
        rows = _general_rows(run, tokenizer, general)
        with updates_off(after):
            before = _loss(after, rows, device)
    held_out = build_dataset(run.data, tokenizer, seed=run.train.seed).eval
    short = [row for row in held_out if row.num_target_tokens <= SHORT_TOKENS][:MOST_ROWS]
    measured = Measured(
        num_short=len(short),
        num_exact=sum(_is_exact(after, row, device) for row in short),
        general_before=before,
        general_after=_loss(after, rows, device),
        num_general_tokens=sum(row.num_target_tokens for row in rows),
    )
    return asdict(measured)


def _general_rows(run: RunConfig, tokenizer: Any, general: str) -> list[Row]:
    data = DataConfig(
        train=general or str(GENERAL_FILE), max_seq_len=run.data.max_seq_len, packing=False
    )
    return build_dataset(data, tokenizer, seed=0).train


def _loss(model: Any, rows: list[Row], device: torch.device) -> float:
    batches = eval_batches(rows, max_tokens=EVAL_TOKENS)
    return evaluate(model, batches, device=device).loss


def _is_exact(model: Any, row: Row, device: torch.device) -> bool:
    """Whether every token of the answer is the likeliest: then greedy decoding gives it."""
    (batch,) = eval_batches([row], max_tokens=1)
    _, num_right, num_tokens = token_metrics(model, batch.to(device))
    return num_right == num_tokens
