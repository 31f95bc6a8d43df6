"""What a finished run is measured on beside its own events: answers, and what it forgot."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nibble.adapter.format import read_adapter
from nibble.config import DataConfig, RunConfig
from nibble.data.chat import NOT_TARGET
from nibble.data.dataset import build_dataset
from nibble.data.loader import eval_batches
from nibble.data.packing import Row
from nibble.errors import DataError
from nibble.model.adapt import updates_off
from nibble.model.load import load_base
from nibble.serve.answers import Form, Prompt, exact_matches
from nibble.train import folder
from nibble.train.build import base_options
from nibble.train.evaluate import EVAL_TOKENS, evaluate

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
        num_exact: Of these, how many greedily without a mistake, up to white space: of several
            turns the last one, after the true ones before it.
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
    general_after = _loss(after, rows, device)
    prompts = [_row_to_prompt(row, tokenizer) for row in short]
    told = exact_matches(
        after, tokenizer, prompts, Form(), max_new_tokens=SHORT_TOKENS, whole=False
    )
    measured = Measured(
        num_short=len(short),
        num_exact=sum(each.is_exact for each in told),
        general_before=before,
        general_after=general_after,
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


def _row_to_prompt(row: Row, tokenizer: Any) -> Prompt:
    """The tokens before the last answer of a row, and the text of that answer.

    Targets at 3 4 5 and 9 10: the prompt is 0 to 8, the answer 9 and 10.
    """
    targets = np.flatnonzero(row.labels != NOT_TARGET)
    starts = targets[np.diff(targets, prepend=-1) > 1]
    ids = row.input_ids.tolist()
    text = tokenizer.decode(ids[starts[-1] : targets[-1] + 1], skip_special_tokens=True)
    return Prompt(ids[: starts[-1]], text, Form().of(text) or "", "", 0)
