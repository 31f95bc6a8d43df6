"""What a run does about short memory: it tries its largest pass first, and halves passes."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch

from nibble.config import RunConfig
from nibble.data.loader import Loader, rows_to_batch
from nibble.errors import OutOfMemoryError
from nibble.events import Emit, WarningRaised
from nibble.train.distributed import ALONE, Ranks
from nibble.train.memory import is_out_of_memory
from nibble.train.optimizer import AdamW
from nibble.train.step import StepResult, TokenLoss, memory_agreed, train_step


@contextmanager
def out_of_memory_named(run: RunConfig, plan: Mapping[str, Any]) -> Iterator[None]:
    """Within the block, torch's error becomes ours, with what was planned and the ways out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error) or "no memory left").splitlines()[0]
        parts = plan.get("parts", {}).items()
        table = "".join(f"\n    {size / 1e9:8.2f} GB  {part}" for part, size in parts)
        planned = f"\n  the plan had:{table}" if table else ""
        ways = "; or ".join(islice(_ways_out(run), 3))
        raise OutOfMemoryError(
            f"the device ran out of memory: {reason}{planned}",
            fix=f"{ways}. Once it has saved a checkpoint, a changed run needs another --out",
        ) from None


def _ways_out(run: RunConfig) -> Iterator[str]:
    """What would need less memory and is not set yet, the greatest help first."""
    if run.method != "qlora":
        yield "set method=qlora"
    if run.train.recompute in ("none", "selective"):
        yield "set train.recompute=full"
    elif run.train.recompute != "tiled" and torch.cuda.is_available():
        yield "set train.recompute=tiled"
    yield f"lower data.max_seq_len, which is {run.data.max_seq_len}"
    if run.optim.paged is not True and torch.cuda.is_available():
        yield "set optim.paged=true"
    if run.method != "full" and run.lora.rank > 1:
        yield f"lower lora.rank, which is {run.lora.rank}"
    yield "free memory that other programs hold"
    yield "take a smaller model"


def step_within_memory(
    token_loss: TokenLoss,
    loader: Loader,
    step: int,
    optimizer: AdamW,
    *,
    lr: float,
    max_grad_norm: float,
    emit: Emit,
    ranks: Ranks = ALONE,
) -> StepResult:
    """One optimizer step; where memory runs out, again with half the rows in a forward pass.

    The rows of the step, and so its loss and gradient, stay the same. The loader keeps the smaller
    number of rows; that of every rank does, where memory runs out on one. At one row, or once the
    optimizer has begun to move, the error goes on.
    """
    while True:
        phases: list[str] = []
        try:
            return train_step(
                token_loss,
                loader.micro_batches(step),
                optimizer,
                lr=lr,
                max_grad_norm=max_grad_norm,
                on_phase=phases.append,
                ranks=ranks,
            )
        except (RuntimeError, MemoryError) as error:
            is_own = phases[-1:] == ["optimizer"] or ranks.has_shards
            if _is_final(error, loader, ranks, is_own=is_own):
                raise
        # Outside of the handler: the error holds on to the tensors of the failed pass.
        _halve(loader, emit)


def rehearse(
    token_loss: TokenLoss,
    loader: Loader,
    num_steps: int,
    optimizer: AdamW,
    *,
    emit: Emit,
    ranks: Ranks = ALONE,
) -> None:
    """The largest forward pass of the run and its backward pass, so that memory runs out now.

    Nothing is learnt, and the random state is put back. Every rank does the same one.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    while True:
        ids = loader.largest_pass(num_steps, loader.micro_batch_size)
        batch = rows_to_batch([loader.rows[i] for i in ids], ids)
        try:
            with torch.random.fork_rng(devices), memory_agreed(ranks):
                token_loss(batch)[0].backward()
            optimizer.zero_grad()
            return
        except (RuntimeError, MemoryError) as error:
            if _is_final(error, loader, ranks, is_own=ranks.has_shards):
                raise
        _halve(loader, emit)


def _is_final(error: BaseException, loader: Loader, ranks: Ranks, *, is_own: bool) -> bool:
    """Whether halving is no way out; `is_own` says that the other ranks do not know of it."""
    if is_own or not is_out_of_memory(error):
        return True
    if loader.micro_batch_size == 1:
        ranks.end_together()
    return loader.micro_batch_size == 1


def _halve(loader: Loader, emit: Emit) -> None:
    before = loader.micro_batch_size
    loader.micro_batch_size = -(-before // 2)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    emit(
        WarningRaised(
            f"memory ran out with {before} rows in a forward pass; going on with "
            f"{loader.micro_batch_size}: the rows of a step, its loss and gradient stay the same"
        )
    )
