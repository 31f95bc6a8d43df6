"""Tiles change memory and the order of sums over tokens, nothing else."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nibble.data.chat import Example
from nibble.data.loader import rows_to_batch
from nibble.data.packing import pack
from nibble.kernels.layers import rms_norm
from nibble.model import tiles
from nibble.model.adapt import adapt
from nibble.model.lean import use_lean_layers
from nibble.model.load import load_base
from nibble.model.recompute import apply_recompute
from nibble.model.tiles import use_tiles
from nibble.train.loss import token_loss

NUM_TOKENS = 20


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "TILE_TOKENS", 8)


class Part(nn.Module):
    """Two trained products around a dropout; counts the tokens it has seen."""

    def __init__(self, share=0.0):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.up = nn.Parameter(torch.randn(12, 6, generator=generator))
        self.down = nn.Parameter(torch.randn(6, 12, generator=generator))
        self.share, self.num_tokens = share, 0

    def forward(self, x):
        self.num_tokens += x.shape[-2]
        return F.dropout(F.gelu(x @ self.up.T), self.share) @ self.down.T


def run(part, x, wrap=lambda part, x: part(x)):
    torch.manual_seed(0)
    x = x.clone().requires_grad_()
    y = wrap(part, x)
    y.square().sum().backward()
    gradients = [x.grad, part.up.grad, part.down.grad]
    return [y.detach(), *gradients, torch.rand(3)]


def by_hand(part, x):
    return torch.cat([part(tile) for tile in x.split(8, dim=-2)], dim=-2)


@pytest.mark.parametrize("num_tokens", [1, 8, 9, 20])
@pytest.mark.parametrize("share", [0.0, 0.4])
def test_equals_tiles_by_hand_and_leaves_the_same_random_state(num_tokens, share):
    x = torch.randn(1, num_tokens, 6, generator=torch.Generator().manual_seed(1))
    part = Part(share)
    use_tiles(part)
    expected = run(Part(share), x, by_hand)
    for found, wanted in zip(run(part, x), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_an_input_without_gradient_still_trains_the_part():
    x = torch.randn(1, NUM_TOKENS, 6, dtype=torch.float64)
    part, plain = Part().double(), Part().double()
    use_tiles(part)
    for each in (part, plain):
        each(x).square().sum().backward()
    torch.testing.assert_close(part.up.grad, plain.up.grad)


def test_without_gradients_nothing_is_recorded():
    part = Part()
    use_tiles(part)
    x = torch.randn(1, NUM_TOKENS, 6, requires_grad=True)
    with torch.no_grad():
        assert torch.equal(part(x), by_hand(Part(), x))
    assert part.num_tokens == NUM_TOKENS


def test_autocast_is_that_of_the_forward_pass():
    part, plain = Part(), Part()
    use_tiles(part)
    x = torch.randn(1, NUM_TOKENS, 6)
    for each, call in ((part, lambda part, x: part(x)), (plain, by_hand)):
        with torch.autocast("cpu", torch.bfloat16):
            y = call(each, x)
        y.float().sum().backward()
    torch.testing.assert_close(part.up.grad, plain.up.grad, rtol=0, atol=1e-6)


def test_a_recipe_is_taken_instead_of_the_input():
    part = Part()
    use_tiles(part)
    x = torch.randn(1, NUM_TOKENS, 6, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        normed = rms_norm(x, torch.ones(6), 1e-5, unit_offset=False)
        y = part(normed)
    y.sum().backward()
    assert all(t is not normed for t in saved)
    plain, z = Part(), x.detach().clone().requires_grad_()
    by_hand(plain, rms_norm(z, torch.ones(6), 1e-5, unit_offset=False)).sum().backward()
    torch.testing.assert_close(x.grad, z.grad)


def _trained(folder, policy):
    model, _ = load_base(str(folder), "float32")
    adapt(model, rank=2, alpha=4, generator=torch.Generator().manual_seed(0))
    use_lean_layers(model)
    apply_recompute(model, policy)
    ids = list(range(5, 5 + NUM_TOKENS))
    rows = pack([Example(ids, [-100, *ids[1:]], "", 0)], max_seq_len=64)
    loss, _ = token_loss(model.train(), rows_to_batch(rows, [0]))
    loss.backward()
    return loss, [p.grad for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize(
    "family", ["llama", "gemma3", "falcon-7b", "falcon-40b", "phi3", "mixtral", "qwen3_moe"]
)
def test_gradients_of_a_model(tiny_model_folder, family):
    loss, gradients = _trained(tiny_model_folder(family), "none")
    tiled_loss, tiled_gradients = _trained(tiny_model_folder(family), "tiled")
    torch.testing.assert_close(tiled_loss, loss, rtol=1e-6, atol=0)
    for found, wanted in zip(tiled_gradients, gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


def test_each_token_is_computed_twice(tiny_model_folder):
    """Once forward and once backward; the recomputed layer around the part stops before it."""
    model, _ = load_base(str(tiny_model_folder("llama")), "float32")
    adapt(model, rank=2, alpha=4)
    counts = []
    for layer in model.model.layers:
        forward = layer.mlp.forward
        layer.mlp.forward = lambda x, forward=forward: counts.append(x.shape[-2]) or forward(x)
    apply_recompute(model, "tiled")
    ids = torch.arange(5, 5 + NUM_TOKENS)[None]
    model.train()(ids, use_cache=False).logits.sum().backward()
    assert sum(counts) == 2 * 2 * NUM_TOKENS
