"""AdamW over one flat state, and the course of the learning rate."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from nibble.config import OptimConfig
from nibble.train.paging import PAGE_BYTES_PER_BIT, PagedMoments, ResidentMoments
from nibble.train.state8bit import MomentFormat, Moments8, Moments32

# Name -> type and shape of a stored tensor.
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
_STRETCH = 2**16


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate: `lr_ratio` times the scheduled one."""

    parameters: tuple[nn.Parameter, ...]
    lr_ratio: float = 1.0


def parameter_groups(model: nn.Module, *, lora_plus_ratio: float = 1.0) -> list[ParameterGroup]:
    """The trainable parameters; factors B learn `lora_plus_ratio` times as fast as A.

    Source:
        LoRA+: Hayou et al. 2024, arXiv:2402.12354.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if lora_plus_ratio == 1.0:
        return [ParameterGroup(tuple(p for _, p in named))]
    factors_B = tuple(p for name, p in named if "lora_B" in name)
    others = tuple(p for name, p in named if "lora_B" not in name)
    groups = [ParameterGroup(others), ParameterGroup(factors_B, lora_plus_ratio)]
    return [group for group in groups if group.parameters]


class AdamW:
    """Adam with decoupled weight decay over flat buffers.

        m = b1 m + (1 - b1) g          p = p (1 - lr wd)
        v = b2 v + (1 - b2) g^2        p = p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    The parameters of a group and their gradients become views of one buffer each, so a step is
    a handful of operations for every page of a million values, whatever the number of layers.

    Args:
        bits: 32 keeps the moments in 8 bytes a value, 8 in 2.03; they are computed in float32.
        is_paged: The moments live in host memory and come to the device page by page.
        budget_bytes: Of a paged optimizer, the moments that may be on the device at once.
        page_bytes: Moments that a step handles at once; None is about a million values.

    Attributes:
        moments: Where m and v are; `PagedMoments` counts what it moves.

    Source:
        Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2.
    """

    def __init__(
        self,
        groups: Iterable[ParameterGroup],
        *,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        bits: Literal[8, 32] = 32,
        is_paged: bool = False,
        budget_bytes: int | None = None,
        page_bytes: int | None = None,
    ) -> None:
        self.weight_decay = weight_decay
        self.betas = betas
        self.eps = eps
        self.num_steps = 0
        self.groups = tuple(groups)
        self._flat = [_FlatGroup.of(group) for group in self.groups]
        device = self._flat[0].value.device
        self._format: MomentFormat = Moments8(device) if bits == 8 else Moments32()
        sizes = [flat.value.numel() for flat in self._flat]
        page_bytes = page_bytes or bits * PAGE_BYTES_PER_BIT
        self.moments: ResidentMoments | PagedMoments
        if is_paged:
            self.moments = PagedMoments(
                self._format.parts, sizes, device, page_bytes=page_bytes, budget_bytes=budget_bytes
            )
        else:
            self.moments = ResidentMoments(self._format.parts, sizes, device, page_bytes=page_bytes)

    def zero_grad(self) -> None:
        """Set every gradient to zero."""
        for flat in self._flat:
            flat.grad.zero_()

    def gradients(self) -> list[Tensor]:
        """The flat gradient of each group; what is written there is what the step sees."""
        return [flat.grad for flat in self._flat]

    def grad_norm(self) -> Tensor:
        """The Euclidean norm of all gradients, a float32 scalar."""
        return torch.cat([_norms_of_stretches(flat.grad) for flat in self._flat]).norm()

    def scale_grad(self, factor: float | Tensor) -> None:
        """Multiply every gradient."""
        for flat in self._flat:
            flat.grad.mul_(factor)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Move the parameters once with learning rate `lr`."""
        self.num_steps += 1
        for page, parts in self.moments.walk():
            flat, group = self._flat[page.group], self.groups[page.group]
            value, grad = flat.value[page.values], flat.grad[page.values]
            exp_avg, exp_avg_sq = self._format.decode(parts)
            self._update(value, grad.float(), exp_avg, exp_avg_sq, lr=lr * group.lr_ratio)
            self._format.encode(exp_avg, exp_avg_sq, parts)

    def _update(
        self, value: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, lr: float
    ) -> None:
        beta1, beta2 = self.betas
        correction1 = 1 - beta1**self.num_steps
        correction2 = math.sqrt(1 - beta2**self.num_steps)
        exp_avg.lerp_(grad, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = exp_avg_sq.sqrt().div_(correction2).add_(self.eps)
        if self.weight_decay:
            value.mul_(1 - lr * self.weight_decay)
        value.addcdiv_(
            exp_avg.to(value.dtype), denominator.to(value.dtype), value=-lr / correction1
        )

    def release(self) -> None:
        """Give moments and gradients back; the optimizer is of no use afterwards."""
        for group in self.groups:
            for parameter in group.parameters:
                parameter.grad = None
        self._flat.clear()
        del self.moments

    def state_pieces(self) -> dict[str, list[Tensor]]:
        """The flat tensors that a resumed run needs, by name, in pieces; nothing is copied."""
        values = {f"group{index}.value": [flat.value] for index, flat in enumerate(self._flat)}
        return {**values, **self.moments.pieces()}

    def layout(self, names: Iterable[str]) -> Layout:
        """What `load_state` takes of a state with these names: moments of 8 or of 32 bits."""
        layout: Layout = {}
        for group, flat in enumerate(self._flat):
            layout[f"group{group}.value"] = flat.value.dtype, (flat.value.numel(),)
            for part in self._format_of(names).parts:
                layout[f"group{group}.{part.name}"] = part.dtype, (part.count(flat.value.numel()),)
        return layout

    def load_state(self, tensors: Mapping[str, Tensor], *, num_steps: int) -> None:
        """Restore the parameters and moments of `state_pieces`, joined.

        Moments that are stored in another number of bits are converted.
        """
        self.num_steps = num_steps
        for index, flat in enumerate(self._flat):
            flat.value.copy_(tensors[f"group{index}.value"])
        stored = self._format_of(tensors)
        if stored.parts != self._format.parts:
            tensors = {
                f"group{group}.{name}": part
                for group, flat in enumerate(self._flat)
                for name, part in self._converted(tensors, f"group{group}.", flat, stored).items()
            }
        self.moments.load(tensors)

    def _format_of(self, names: Iterable[str]) -> MomentFormat:
        """The format of a state with these names."""
        if any(name.endswith(f".{part.name}") for name in names for part in self._format.parts):
            return self._format
        is_8bit = isinstance(self._format, Moments8)
        return Moments32() if is_8bit else Moments8(torch.device("cpu"))

    def _converted(
        self, tensors: Mapping[str, Tensor], prefix: str, flat: "_FlatGroup", stored: MomentFormat
    ) -> dict[str, Tensor]:
        parts = {part.name: tensors[f"{prefix}{part.name}"].cpu() for part in stored.parts}
        exp_avg, exp_avg_sq = stored.decode(parts)
        num_values, wanted = flat.value.numel(), self._format.parts
        new = {part.name: torch.zeros(part.count(num_values), dtype=part.dtype) for part in wanted}
        if isinstance(self._format, Moments8):
            Moments8(torch.device("cpu")).encode(exp_avg, exp_avg_sq, new)
            return new
        return {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}


def build_optimizer(model: nn.Module, optim: OptimConfig) -> AdamW:
    """The optimizer of all that is trained in `model`."""
    return AdamW(
        parameter_groups(model, lora_plus_ratio=optim.lora_plus_ratio),
        weight_decay=optim.weight_decay,
        bits=8 if optim.name == "adamw8bit" else 32,
        is_paged=bool(optim.paged),
    )


def _norms_of_stretches(values: Tensor) -> Tensor:
    """Norms of stretches of `values`: torch sums hundreds of millions of squares 3 % short."""
    num_whole = values.numel() // _STRETCH * _STRETCH
    stretches = values[:num_whole].view(-1, _STRETCH)
    norms = torch.linalg.vector_norm(stretches, dim=1, dtype=torch.float32)
    rest = torch.linalg.vector_norm(values[num_whole:], dtype=torch.float32)
    return torch.cat([norms, rest[None]])


@dataclass
class _FlatGroup:
    value: Tensor
    grad: Tensor

    @classmethod
    def of(cls, group: ParameterGroup) -> "_FlatGroup":
        first = group.parameters[0]
        ends = list(accumulate(p.numel() for p in group.parameters))
        parts = [slice(*pair) for pair in pairwise([0, *ends])]
        value = torch.empty(ends[-1], dtype=first.dtype, device=first.device)
        for p, part in zip(group.parameters, parts, strict=True):
            value[part].copy_(p.data.flatten())
            p.data = value[part].view_as(p)
        # Only now, when the old values are gone: three copies at once would be the run's peak.
        grad = torch.zeros_like(value)
        for p, part in zip(group.parameters, parts, strict=True):
            p.grad = grad[part].view_as(p)
        return cls(value, grad)


def learning_rate(
    step: int, *, steps: int, peak: float, warmup: float = 0.0, schedule: str = "cosine"
) -> float:
    """The learning rate of step `step`, counted from 0.

    Rises over ceil(warmup * steps) steps, then follows the schedule: cosine and linear reach 0
    just after the last step, so that no step is wasted.

    >>> [learning_rate(s, steps=4, peak=1.0, schedule="linear") for s in range(4)]
    [1.0, 0.75, 0.5, 0.25]
    """
    num_warmup = math.ceil(warmup * steps)
    if step < num_warmup:
        return peak * (step + 1) / (num_warmup + 1)
    progress = (step - num_warmup) / max(1, steps - num_warmup)
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (1 - progress) if schedule == "linear" else peak
