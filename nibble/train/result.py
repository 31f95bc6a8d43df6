"""What a finished run leaves: an adapter or a model, and its figures."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from nibble.adapter.format import write_adapter
from nibble.disk import disk_errors, sync_tree
from nibble.events import EvalEnd, StepEnd, read_events
from nibble.train import folder
from nibble.train.card import run_card
from nibble.train.checkpoint import TrainState
from nibble.train.distributed import Ranks
from nibble.train.job import Job


@dataclass(frozen=True)
class Result:
    """What a finished run leaves.

    Args:
        out: The run folder.
        adapter: The adapter folder; of a full fine-tune, the folder of the whole model.
        final_loss: Training loss of the last step, in nats per target token.
        eval_loss: Held-out loss after training; None without held-out data.
        peak_memory_bytes: See `PeakMemory`.
        tokens_per_s: Tokens trained over the time of the steps.
    """

    out: Path
    adapter: Path
    final_loss: float
    eval_loss: float | None
    peak_memory_bytes: int
    tokens_per_s: float


def write_result(job: Job, state: TrainState, last: EvalEnd | None) -> Path:
    """Write the adapter, or after a full fine-tune the model, which is of no use afterwards.

    Args:
        last: Held-out loss after training, for the card.

    Raises:
        DiskError: If it cannot be written.
    """
    run = job.run
    if run.method == "full":
        target = job.out / "model"
        # The last checkpoint stands: what it holds need not stay beside the copy in 16 bits.
        job.optimizer.release()
        disable_progress_bar()
        with disk_errors(f"cannot write the model {target}"):
            job.model.to(torch.bfloat16).save_pretrained(target)
            job.tokenizer.save_pretrained(target)
            sync_tree(target)
        return target
    return write_adapter(
        job.model,
        job.out / "adapter",
        tokenizer=job.tokenizer,
        base=run.model.name,
        revision=run.model.revision,
        card=run_card(run, state, last),
    )


def read_result(out: Path) -> Result:
    """The result of a finished run, off its event log."""
    final_loss, eval_loss, end = math.nan, None, folder.last_end(out)
    for event in read_events(out / folder.EVENTS_FILE):
        if isinstance(event, StepEnd):
            final_loss = event.loss
        elif isinstance(event, EvalEnd):
            eval_loss = event.loss
    assert end is not None, "the run is finished"
    return Result(
        out=out,
        adapter=out / Path(end.adapter).name,
        final_loss=final_loss,
        eval_loss=eval_loss,
        peak_memory_bytes=end.peak_memory_bytes,
        tokens_per_s=end.tokens / max(end.seconds, 1e-9),
    )


def share_result(out: Path, ranks: Ranks) -> Result:
    """The result of a finished run, on every rank, as rank 0 reads it."""
    if ranks.is_alone:
        return read_result(out)
    values = asdict(read_result(out)) if ranks.is_first else {}
    paths = ("out", "adapter")
    values = ranks.of_first({k: str(v) if k in paths else v for k, v in values.items()})
    return Result(**{**values, **{key: Path(values[key]) for key in paths}})
