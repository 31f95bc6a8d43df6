"""One real training step of a run on fake tensors: what is alive when, and for what.

    config.json -> modules -> weights without values, placed as the loader places them
                -> adapters and optimizer -> train_step and evaluate, as training calls them

Nothing is computed and nothing is read but the config, so a plan for 70 billion weights takes
seconds. The code is the code of training: what it allocates, the tracker sees.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from nibble.config import RunConfig
from nibble.data.loader import Batch
from nibble.kernels.target import device_type, host_empty, planned_device
from nibble.model.ledger import count_parameters
from nibble.model.linear4bit import fresh_scratch
from nibble.model.names import tied_names
from nibble.model.place import Placer, Storage
from nibble.model.skeleton import build_config, build_skeleton
from nibble.plan.tracker import MOST_EXPERTS, MemoryTracker, Operation, Peak
from nibble.plan.watch import (
    BASE_4BIT,
    BASE_DENSE,
    WORKING,
    watch_build,
    watch_evaluation,
    watch_result,
    watch_step,
)
from nibble.train.build import storage_of

# Allocator granularity of CUDA. Source: torch c10/cuda/CUDACachingAllocator, kMinBlockSize.
CUDA_GRANULARITY = 512

aten: Any = torch.ops.aten


@dataclass(frozen=True)
class Shape:
    """The rows that a step is simulated for.

    Args:
        micro_batches: Document lengths of each forward pass of an optimizer step.
        eval_documents: Document lengths of the largest evaluation batch; empty without one.
        target_share: Share of tokens that carry loss, in (0, 1].
    """

    micro_batches: tuple[tuple[int, ...], ...]
    eval_documents: tuple[int, ...] = ()
    target_share: float = 1.0


@dataclass(frozen=True)
class Simulation:
    """What one step needs.

    Args:
        phases: Peak device bytes of load, build, forward, backward, optimizer, eval, save, merge.
        host_base_bytes: What the base has in host memory.
        paged_bytes: Optimizer state in host memory.
        offloaded_bytes: Peak of the inputs of layers in host memory.
        work: Operations of each phase.
        num_trainable: Values that are trained.
        num_total: Values of base and adapters.
    """

    phases: dict[str, Peak]
    host_base_bytes: int
    paged_bytes: int
    offloaded_bytes: int
    work: dict[str, Counter[Operation]]
    num_trainable: int
    num_total: int

    @property
    def peak(self) -> Peak:
        """The highest phase of training."""
        return highest(self.phases)


def highest(phases: dict[str, Peak]) -> Peak:
    """The highest phase; merging is no part of a run."""
    return max((p for name, p in phases.items() if name != "merge"), key=lambda peak: peak.bytes)


def simulate(run: RunConfig, values: dict[str, Any], shape: Shape, *, device: str) -> Simulation:
    """One optimizer step and one evaluation of `run` on fake tensors.

    Args:
        run: Concrete values; `auto` is resolved.
        values: What config.json says of the model.
        device: "cpu" or "cuda": whose implementations are chosen.

    Raises:
        ModelError: If the architecture is unknown or cannot be built.
    """
    storage = storage_of(run)
    model = build_skeleton(build_config(values), storage.dtype)
    weights = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    documents = [*shape.micro_batches, shape.eval_documents or (1,)]
    # Boundaries of documents are numbers, also where tensors have no values.
    boundaries = [torch.tensor([0, *lengths]).cumsum(0).to(torch.int32) for lengths in documents]
    tracker = MemoryTracker(granularity=CUDA_GRANULARITY if device == "cuda" else 1)
    tracker.intercept = _Answers(tracker, shape.target_share)
    planned = planned_device(device, on_kernel=tracker.count_kernel)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with planned, fresh_scratch() as buffers, fake, tracker:
        tracker.begin("load", BASE_DENSE if storage.quant is None else BASE_4BIT)
        _load(model, storage, weights, tracker)
        host_base_bytes = tracker.host_bytes
        optimizer = watch_build(model, run, tracker)
        host_bytes = tracker.host_peak = tracker.host_bytes
        *batches, held_out = [_batch(ends, shape.target_share) for ends in boundaries]
        tracker.name(boundaries, WORKING)
        watch_step(model, optimizer, run, batches, tracker, buffers)
        if shape.eval_documents:
            watch_evaluation(model, run, held_out, tracker, buffers)
        watch_result(model, optimizer, run, tracker)
    return Simulation(
        phases=tracker.peaks,
        host_base_bytes=host_base_bytes,
        paged_bytes=host_bytes - host_base_bytes,
        offloaded_bytes=tracker.host_peak - host_bytes,
        work=tracker.work,
        num_trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        num_total=count_parameters(model),
    )


def _load(
    model: Any, storage: Storage, weights: dict[str, tuple[int, ...]], tracker: MemoryTracker
) -> None:
    """Place every weight without values, as the loader does; on a CPU from one shared buffer."""
    for name, buffer in list(model.named_buffers()):
        owner = model.get_submodule(name.rpartition(".")[0])
        owner._buffers[name.rpartition(".")[2]] = torch.empty(buffer.shape, dtype=buffer.dtype)
    placer, ties = Placer(model, storage, torch.device("cpu")), tied_names(model)
    largest = max(prod(shape) for name, shape in weights.items() if name not in ties)
    is_cpu = device_type(torch.device("cpu")) == "cpu"
    new = partial(torch.empty if is_cpu else host_empty, dtype=torch.bfloat16)
    borrowed = new(largest)
    tracker.name([borrowed], WORKING)
    for name, shape in weights.items():
        if name in ties:
            continue
        if placer.needs_copy(name):
            placer.place(name, torch.empty(shape, dtype=torch.bfloat16))
        else:
            placer.place(name, borrowed[: prod(shape)].view(shape))
    del borrowed
    placer.finish()


def _batch(ends: Tensor, target_share: float) -> Batch:
    """Rows without values whose documents end at `ends`."""
    boundaries = ends.tolist()
    ids, labels, positions = (torch.empty(1, boundaries[-1], dtype=torch.int64) for _ in range(3))
    # Falcon's attention reads the boundaries off the positions, which have no values here.
    positions.nibble_documents = tuple(boundaries)  # type: ignore[attr-defined]
    longest = max(stop - start for start, stop in pairwise(boundaries))
    num_targets = max(1, round(target_share * boundaries[-1]))
    return Batch(ids, labels, positions, ends, longest, num_targets, ())


class _Answers:
    """Answers in place of operations whose result depends on values, which are not there.

    Losses and norms are 2; the share of tokens with a target is as given; tokens spread evenly over
    up to 8 experts, so that the busiest of many has several times its share. Attention on CUDA is
    charged with the scratch of its backward kernel.
    """

    def __init__(self, tracker: MemoryTracker, target_share: float) -> None:
        self._tracker, self._target_share = tracker, target_share
        self._counts: Iterator[int] = iter(())

    def __call__(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is aten._local_scalar_dense.default:
            return self._number(args[0].dtype)
        if func is aten.nonzero.default:
            found = max(1, round(self._target_share * args[0].numel()))
            return args[0].new_empty((found, args[0].ndim), dtype=torch.int64)
        if func is aten.bincount.default:
            num_busy = min(args[2], MOST_EXPERTS)
            self._counts = iter([args[0].numel() // num_busy] * num_busy + [0] * args[2])
            return args[0].new_empty(args[2])
        if func is aten._grouped_mm.default:
            return args[0].new_empty(_grouped_shape(*args[:3]))
        if func is aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
            self._charge_attention(*args[1:3])
        return None

    def _number(self, dtype: torch.dtype) -> float | int | bool:
        if dtype.is_floating_point:
            return 2.0
        return True if dtype == torch.bool else next(self._counts, 1)

    def _charge_attention(self, query: Tensor, key: Tensor) -> None:
        """float32 sums of dQ and of dO * O; dK and dV per query head where heads share keys.

        Source: flash-attention 2, csrc/flash_attn/flash_api.cpp, mha_bwd.
        """
        if device_type(query) == "cpu":
            return
        num_bytes = 4 * query.numel() + 4 * query.numel() // query.shape[-1]
        if query.shape[1] != key.shape[1]:
            num_bytes += 2 * query.numel() * query.itemsize
        self._tracker.count_scratch(num_bytes)


def _grouped_shape(left: Tensor, right: Tensor, ends: Tensor) -> tuple[int, ...]:
    """The shape of the products of E groups of rows that end at `ends`.

    (T, I) by (E, I, O) -> (T, O);  (O, T) by (T, I) -> (E, O, I).
    """
    if right.ndim == 2:
        return len(ends), left.shape[0], right.shape[1]
    return left.shape[0], right.shape[2]
