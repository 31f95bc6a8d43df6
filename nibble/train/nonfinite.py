"""What a run was doing when a loss, a gradient or a weight stopped being a number.

RUN/nonfinite.json    step, loss of every pass with its rows, norms and counts of every module

Of held-out rows it holds the passes whose loss is no number, and the modules once.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nibble.data.loader import Batch
from nibble.disk import replace_file
from nibble.train.step import TokenLoss

REPORT_FILE = "nonfinite.json"


def write_report(
    out: Path,
    model: nn.Module,
    token_loss: TokenLoss,
    batches: Iterable[Batch],
    *,
    step: int,
    reason: str,
    is_held_out: bool = False,
    is_written: bool = True,
) -> Path:
    """Go through the passes of a step once more, one by one, and write down what each gives.

    Args:
        batches: The passes of the step, or of the held-out rows after it.
        step: Its number, from 1; 0 before training.
        is_held_out: Whether they are that; nothing is differentiated then.
        reason: What the step ended with.
        is_written: False only goes through the passes, as a rank does that does not write.

    Raises:
        OSError: If it cannot be written.
    """
    values: dict[str, Any] = {"version": 1, "step": step, "reason": reason}
    if is_held_out:
        values |= _held_out_report(model, token_loss, batches)
    else:
        values["passes"] = [_pass_report(model, token_loss, batch) for batch in batches]
    path = out / REPORT_FILE
    if is_written:
        replace_file(path, (json.dumps(values, indent=2) + "\n").encode())
    return path


def _pass_report(model: nn.Module, token_loss: TokenLoss, batch: Batch) -> dict[str, Any]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        if parameter.grad is not None:
            parameter.grad.zero_()
    loss_sum, num_targets = token_loss(batch)
    loss_sum.backward()
    return {
        **_loss_report(batch, loss_sum, num_targets),
        "modules": {
            name: {**_module_report(p), **_gradient_report(p)} for name, p in trained.items()
        },
    }


@torch.no_grad()
def _held_out_report(
    model: nn.Module, token_loss: TokenLoss, batches: Iterable[Batch]
) -> dict[str, Any]:
    model.eval()
    passes = [_loss_report(batch, *token_loss(batch)) for batch in batches]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {
        "passes": [each for each in passes if isinstance(each["loss"], str)],
        "modules": {name: _module_report(p) for name, p in trained.items()},
    }


def _loss_report(batch: Batch, loss_sum: Tensor, num_targets: int) -> dict[str, Any]:
    return {
        "rows": list(batch.row_ids),
        "num_tokens": batch.input_ids.numel(),
        "loss": _number(loss_sum / max(1, num_targets)),
    }


def _module_report(parameter: nn.Parameter) -> dict[str, Any]:
    return {"norm": _number(parameter.detach().norm()), "num_not_finite": _count(parameter)}


def _gradient_report(parameter: nn.Parameter) -> dict[str, Any]:
    gradient = parameter.grad
    if gradient is None:
        return {}
    return {"grad_norm": _number(gradient.norm()), "grad_num_not_finite": _count(gradient)}


def _count(values: Tensor) -> int:
    return int((~torch.isfinite(values.detach())).sum())


def _number(value: Tensor) -> float | str:
    """A number, or "nan", "inf", "-inf", which JSON does not have."""
    number = float(value.detach())
    return number if math.isfinite(number) else str(number)
