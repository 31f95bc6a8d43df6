"""AdamW over one flat state, and the course of the learning rate."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


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
    a handful of operations whatever the number of layers. Moments are float32.

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
    ) -> None:
        self.weight_decay = weight_decay
        self.betas = betas
        self.eps = eps
        self.num_steps = 0
        self.groups = tuple(groups)
        self._flat = [_FlatGroup.of(group) for group in self.groups]

    def zero_grad(self) -> None:
        """Set every gradient to zero."""
        for flat in self._flat:
            flat.grad.zero_()

    def grad_norm(self) -> Tensor:
        """The Euclidean norm of all gradients, a float32 scalar."""
        return torch.stack([flat.grad.float().norm() for flat in self._flat]).norm()

    def scale_grad(self, factor: float | Tensor) -> None:
        """Multiply every gradient."""
        for flat in self._flat:
            flat.grad.mul_(factor)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Move the parameters once with learning rate `lr`."""
        self.num_steps += 1
        beta1, beta2 = self.betas
        correction1 = 1 - beta1**self.num_steps
        correction2 = math.sqrt(1 - beta2**self.num_steps)
        for flat, group in zip(self._flat, self.groups, strict=True):
            group_lr = lr * group.lr_ratio
            grad = flat.grad.float()
            flat.exp_avg.lerp_(grad, 1 - beta1)
            flat.exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            denominator = flat.exp_avg_sq.sqrt().div_(correction2).add_(self.eps)
            if self.weight_decay:
                flat.value.mul_(1 - group_lr * self.weight_decay)
            flat.value.addcdiv_(
                flat.exp_avg.to(flat.value.dtype),
                denominator.to(flat.value.dtype),
                value=-group_lr / correction1,
            )

    def state(self) -> dict[str, Tensor]:
        """The tensors that a resumed run needs, by name; they are not copied."""
        tensors: dict[str, Tensor] = {}
        for index, flat in enumerate(self._flat):
            tensors[f"group{index}.value"] = flat.value
            tensors[f"group{index}.exp_avg"] = flat.exp_avg
            tensors[f"group{index}.exp_avg_sq"] = flat.exp_avg_sq
        return tensors

    def load_state(self, tensors: dict[str, Tensor], *, num_steps: int) -> None:
        """Restore what `state` gave; the parameters included."""
        self.num_steps = num_steps
        for name, tensor in self.state().items():
            tensor.copy_(tensors[name])


@dataclass
class _FlatGroup:
    value: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    @classmethod
    def of(cls, group: ParameterGroup) -> "_FlatGroup":
        first = group.parameters[0]
        size = sum(p.numel() for p in group.parameters)
        value = torch.empty(size, dtype=first.dtype, device=first.device)
        grad = torch.zeros_like(value)
        start = 0
        for p in group.parameters:
            part = slice(start, start + p.numel())
            value[part].copy_(p.data.flatten())
            p.data = value[part].view_as(p)
            p.grad = grad[part].view_as(p)
            start = part.stop
        moments = [torch.zeros(size, dtype=torch.float32, device=first.device) for _ in range(2)]
        return cls(value, grad, *moments)


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
