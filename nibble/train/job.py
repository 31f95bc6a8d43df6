"""The parts of a run, built from its config."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nibble.config import RunConfig, unused_keys
from nibble.data.dataset import Dataset, build_dataset
from nibble.data.loader import Batch, Loader
from nibble.events import Emit, LoadEnd, WarningRaised
from nibble.model.ledger import count_parameters, resident_bytes
from nibble.model.load import load_base
from nibble.train.build import autocast_of, base_options, equip
from nibble.train.distributed import ALONE, Ranks
from nibble.train.loss import token_loss
from nibble.train.memory import PeakMemory
from nibble.train.optimizer import AdamW


@dataclass
class Job:
    """The parts of a run, built and ready."""

    run: RunConfig
    out: Path
    model: Any
    tokenizer: Any
    dataset: Dataset
    loader: Loader
    optimizer: AdamW
    device: torch.device
    autocast: torch.dtype | None
    peak: PeakMemory
    steps: int
    ranks: Ranks

    def token_loss(self, batch: Batch) -> tuple[Tensor, int]:
        """The summed loss of a batch, wherever it is, and the number of its target tokens."""
        return token_loss(self.model, batch.to(self.device), autocast=self.autocast)


def build_job(
    run: RunConfig, out: Path, emit: Emit, dataset: Dataset | None = None, ranks: Ranks = ALONE
) -> Job:
    """Load, adapt, read the data if need be, make the optimizer; say what is resident."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(run.train.seed)
    peak = PeakMemory(device)
    start = time.monotonic()
    is_sharded = run.train.shard and run.method != "full" and not ranks.is_alone
    # A base that is cut may be larger than a device: it is made in host memory.
    place = torch.device("cpu") if is_sharded else device
    model, tokenizer = load_base(
        run.model.name, revision=run.model.revision, device=place, **base_options(run)
    )
    optimizer = equip(model, run, device if is_sharded else None)
    if is_sharded:
        ranks.cut_base()
    seconds = time.monotonic() - start
    dataset = dataset or build_dataset(run.data, tokenizer, seed=run.train.seed)
    for warning in [*_unused(run, ranks), *dataset.warnings]:
        emit(WarningRaised(warning))
    loader = Loader(
        dataset.train,
        batch_size=run.train.batch_size,
        micro_batch_size=int(run.train.micro_batch_size),
        seed=run.train.seed,
        rank=ranks.rank,
        world_size=ranks.world_size,
        is_even=is_sharded,
    )
    resident = resident_bytes(model)
    num_trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    emit(
        LoadEnd(
            resident_bytes=resident,
            total_bytes=sum(resident.values()),
            num_trainable=num_trainable,
            num_total=count_parameters(model),
            seconds=seconds,
        )
    )
    steps = run.train.steps or loader.steps(run.train.epochs)
    return Job(
        run=run,
        out=out,
        model=model,
        tokenizer=tokenizer,
        dataset=dataset,
        loader=loader,
        optimizer=optimizer,
        device=device,
        autocast=autocast_of(run),
        peak=peak,
        steps=steps,
        ranks=ranks,
    )


def _unused(run: RunConfig, ranks: Ranks) -> list[str]:
    beside = {"train.epochs": "train.steps"}
    unused = {key: beside.get(key, f"method={run.method}") for key in unused_keys(run)}
    if run.train.shard and ranks.is_alone:
        unused.setdefault("train.shard", "one device: see `nibble train --devices`")
    return [f"{key} does nothing with {reason}" for key, reason in unused.items()]


def open_keys(run: RunConfig) -> list[str]:
    """The keys that are `auto`: what a plan must choose before a run is trained."""
    return [key for key, value in run.flat().items() if value == "auto" and key != "data.format"]
