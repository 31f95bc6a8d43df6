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
from nibble.train.optimizer import AdamW
from nibble.train.step import StepResult, TokenLoss, train_step

_CPU_MESSAGE = "DefaultCPUAllocator"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a CUDA device or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _CPU_MESSAGE in str(error)


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
) -> StepResult:
    """One optimizer step; where memory runs out, again with half the rows in a forward pass.

    The rows of the step, and so its loss and gradient, stay the same. The loader keeps the smaller
    number of rows. At one row, or once the optimizer has begun to move, the error goes on.
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
            )
        except (RuntimeError, MemoryError) as error:
            is_final = loader.micro_batch_size == 1 or phases[-1:] == ["optimizer"]
            if is_final or not is_out_of_memory(error):
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
) -> None:
    """The largest forward pass of the run and its backward pass, so that memory runs out now.

    Nothing is learnt, and the random state is put back.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    while True:
        ids = loader.largest_pass(num_steps, loader.micro_batch_size)
        batch = rows_to_batch([loader.rows[i] for i in ids], ids)
        try:
            with torch.random.fork_rng(devices):
                token_loss(batch)[0].backward()
            optimizer.zero_grad()
            return
        except (RuntimeError, MemoryError) as error:
            if loader.micro_batch_size == 1 or not is_out_of_memory(error):
                raise
        _halve(loader, emit)


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
