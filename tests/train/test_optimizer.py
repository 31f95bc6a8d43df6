"""AdamW against torch's, and the schedule."""

import pytest
import torch
from torch import nn

from nibble.config import OptimConfig
from nibble.model.linear4bit import DenseLinear
from nibble.model.lora import LoRALinear
from nibble.train.optimizer import (
    AdamW,
    ParameterGroup,
    build_optimizer,
    learning_rate,
    parameter_groups,
)
from nibble.train.paging import PagedMoments, ResidentMoments


def _joined(pieces):
    return {name: torch.cat(parts) for name, parts in pieces.items()}


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_equals_torch(weight_decay):
    torch.manual_seed(0)
    ours, theirs = ([nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(5))] for _ in "ab")
    mine = AdamW([ParameterGroup(tuple(ours))], weight_decay=weight_decay)
    reference = torch.optim.AdamW(theirs, lr=0.01, weight_decay=weight_decay)
    for _ in range(20):
        for a, b in zip(ours, theirs, strict=True):
            a.grad.copy_(torch.randn_like(a))
            b.grad = a.grad.clone()
        mine.step(0.01)
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_gradients_and_values_are_views_of_one_buffer():
    parameters = (nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(3)))
    optimizer = AdamW([ParameterGroup(parameters)])
    (sum((p * 2).sum() for p in parameters)).backward()
    assert float(optimizer.grad_norm()) == pytest.approx((7 * 4) ** 0.5)
    optimizer.scale_grad(0.5)
    assert all((p.grad == 1).all() for p in parameters)
    optimizer.zero_grad()
    assert all((p.grad == 0).all() for p in parameters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_many_values_is_exact(dtype):
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.zeros(50_000_003, dtype=dtype))
    optimizer = AdamW([ParameterGroup((parameter,))])
    parameter.grad.normal_()
    parameter.grad[-1] = 3000
    expected = float(torch.linalg.vector_norm(parameter.grad, dtype=torch.float64))
    assert float(optimizer.grad_norm()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("bits", [32, 8])
def test_state_round_trip(bits):
    def make():
        torch.manual_seed(0)
        parameter = nn.Parameter(torch.randn(300))
        return parameter, AdamW([ParameterGroup((parameter,))], bits=bits)

    parameter, optimizer = make()
    for _ in range(3):
        parameter.grad.fill_(0.3)
        optimizer.step(0.1)
    other, restored = make()
    restored.load_state(
        {k: v.clone() for k, v in _joined(optimizer.state_pieces()).items()}, num_steps=3
    )
    for p, o in ((parameter, optimizer), (other, restored)):
        p.grad.fill_(0.2)
        o.step(0.1)
    assert torch.equal(parameter, other)


def test_state_has_the_same_names_whatever_the_number_of_pages():
    def names(**options):
        return list(
            _joined(
                AdamW([ParameterGroup((nn.Parameter(torch.ones(600)),))], **options).state_pieces()
            )
        )

    assert names() == ["group0.value", "group0.exp_avg", "group0.exp_avg_sq"]
    assert names(is_paged=True, page_bytes=2048) == names()
    assert names(bits=8) == names(bits=8, is_paged=True, page_bytes=520)
    assert sorted(names(bits=8)) == [
        "group0.exp_avg.codes",
        "group0.exp_avg.scale",
        "group0.exp_avg_sq.codes",
        "group0.exp_avg_sq.scale",
        "group0.value",
    ]


def test_optimizer_of_a_config():
    layer = LoRALinear(DenseLinear(nn.Linear(4, 4)), rank=2, alpha=2)
    plain = build_optimizer(layer, OptimConfig(paged=False))
    assert isinstance(plain.moments, ResidentMoments)
    assert "group0.exp_avg" in _joined(plain.state_pieces())
    narrow = build_optimizer(layer, OptimConfig(name="adamw8bit", paged=True, lora_plus_ratio=2.0))
    assert isinstance(narrow.moments, PagedMoments)
    assert "group1.exp_avg.codes" in _joined(narrow.state_pieces())


def test_lora_plus_groups():
    layer = LoRALinear(DenseLinear(nn.Linear(4, 4)), rank=2, alpha=2)
    first, second = parameter_groups(layer, lora_plus_ratio=8.0)
    assert (first.lr_ratio, second.lr_ratio) == (1.0, 8.0)
    assert first.parameters[0] is layer.lora_A
    assert second.parameters[0] is layer.lora_B


def test_schedule():
    def rates(**values):
        return [learning_rate(s, steps=4, peak=1.0, **values) for s in range(4)]

    assert rates(schedule="constant") == [1.0] * 4
    assert rates(schedule="linear") == [1.0, 0.75, 0.5, 0.25]
    assert rates(schedule="linear", warmup=0.5) == pytest.approx([1 / 3, 2 / 3, 1.0, 0.5])
    cosine = rates()
    assert cosine[0] == 1.0
    assert cosine[2] == pytest.approx(0.5)


def test_released_moments_and_gradients_are_gone():
    parameter = nn.Parameter(torch.ones(8))
    optimizer = AdamW([ParameterGroup((parameter,))])
    optimizer.release()
    assert parameter.grad is None
    assert not hasattr(optimizer, "moments")
    assert torch.equal(parameter, torch.ones(8))
