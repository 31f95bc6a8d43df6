"""One step equals one big batch, however its rows are split, packed or ordered."""

import math
import re

import pytest
import torch

from nibble.data.chat import Example
from nibble.data.loader import Loader, next_labels, rows_to_batch
from nibble.data.packing import pack
from nibble.errors import NonFiniteError
from nibble.model.adapt import adapt
from nibble.model.load import load_base
from nibble.train.loss import token_loss
from nibble.train.optimizer import AdamW, parameter_groups
from nibble.train.step import train_step


def _examples():
    """16 documents with 1 to 20 targets each."""
    generator = torch.Generator().manual_seed(0)
    examples = []
    for number in range(16):
        ids = torch.randint(5, 300, (12 + number,), generator=generator).tolist()
        num_prompt = len(ids) - 1 - (7 * number) % 20 if number % 3 else len(ids) - 2
        num_prompt = max(1, num_prompt)
        examples.append(Example(ids, [-100] * num_prompt + ids[num_prompt:], "", number))
    return examples


def _model(folder):
    model, _ = load_base(str(folder), "float32")
    adapt(model, rank=4, alpha=8, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=generator)
    return model.train()


def _gradient(folder, batches):
    """The gradient that one step accumulates; a learning rate of 0 leaves the model alone."""
    model = _model(folder)
    optimizer = AdamW(parameter_groups(model))

    def loss(batch):
        return token_loss(model, batch)

    train_step(loss, batches, optimizer, lr=0.0, max_grad_norm=float("inf"))
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def _difference(a, b):
    return float((a - b).norm() / a.norm())


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_accumulation_is_one_big_batch(tiny_model_folder, micro_batch_size):
    rows = pack(_examples(), max_seq_len=64, packing=False)
    split = [
        Loader(rows, batch_size=16, micro_batch_size=size, seed=0).micro_batches(0)
        for size in (16, micro_batch_size)
    ]
    whole, parts = (_gradient(tiny_model_folder("llama"), batches) for batches in split)
    assert _difference(whole, parts) <= 1e-6


def test_packed_equals_unpacked(tiny_model_folder):
    gradients = []
    for packing in (False, True):
        rows = pack(_examples(), max_seq_len=64, packing=packing)
        batch = rows_to_batch(rows, range(len(rows)))
        gradients.append(_gradient(tiny_model_folder("llama"), [batch]))
    assert _difference(*gradients) <= 1e-6


def test_order_of_micro_batches(tiny_model_folder):
    rows = pack(_examples(), max_seq_len=64, packing=False)
    batches = Loader(rows, batch_size=16, micro_batch_size=4, seed=0).micro_batches(0)
    forward, backward = (
        _gradient(tiny_model_folder("llama"), order) for order in (batches, batches[::-1])
    )
    assert _difference(forward, backward) <= 1e-6


def test_loss_is_that_of_transformers(tiny_model_folder):
    rows = pack(_examples()[:1], max_seq_len=64, packing=False)
    batch = rows_to_batch(rows, [0])
    model = _model(tiny_model_folder("llama"))
    ours = token_loss(model, batch)[0] / batch.num_target_tokens
    logits = model(batch.input_ids).logits[0]
    theirs = torch.nn.functional.cross_entropy(logits, next_labels(batch.labels))
    torch.testing.assert_close(ours, theirs)


def test_step_moves_and_reports(tiny_model_folder):
    rows = pack(_examples(), max_seq_len=64, packing=False)
    model = _model(tiny_model_folder("llama"))
    optimizer = AdamW(parameter_groups(model))
    loader = Loader(rows, batch_size=16, micro_batch_size=8, seed=0)
    results = [
        train_step(
            lambda batch: token_loss(model, batch),
            loader.micro_batches(0),
            optimizer,
            lr=1e-2,
            max_grad_norm=1.0,
        )
        for _ in range(3)
    ]
    assert results[2].loss < results[0].loss
    assert results[0].tokens == sum(len(row) for row in rows)
    assert results[0].num_target_tokens == sum(row.num_target_tokens for row in rows)


@pytest.fixture
def one_step(tiny_model_folder):
    """A model, its optimizer after a first step, and a function that takes one step more."""
    rows = pack(_examples(), max_seq_len=64, packing=False)
    model = _model(tiny_model_folder("llama"))
    optimizer = AdamW(parameter_groups(model))
    batches = Loader(rows, batch_size=4, micro_batch_size=2, seed=0).micro_batches(0)

    def take(spoil=lambda loss: loss):
        return train_step(
            lambda batch: (spoil(token_loss(model, batch)[0]), 1),
            batches,
            optimizer,
            lr=1e-2,
            max_grad_norm=1.0,
        )

    take()
    return model, optimizer, batches, take


BAD = [float("nan"), float("inf"), -float("inf")]


def _state(optimizer):
    return {
        name: torch.cat([piece.clone() for piece in pieces])
        for name, pieces in optimizer.state_pieces().items()
    }


def _assert_refused(optimizer, take, match, **more):
    """Nothing of the optimizer's state is another value afterwards."""
    before, num_steps = _state(optimizer), optimizer.num_steps
    with pytest.raises(NonFiniteError, match=match) as error:
        take(**more)
    assert error.value.exit_code == 76
    assert "did not move" in str(error.value)
    for name, value in _state(optimizer).items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    assert optimizer.num_steps == num_steps


@pytest.mark.parametrize("bad", BAD)
def test_a_loss_that_is_no_number(one_step, bad):
    _, optimizer, batches, take = one_step
    rows = list(batches[0].row_ids)
    match = f"the loss is .* at rows {re.escape(str(rows))}"
    _assert_refused(optimizer, take, match, spoil=lambda loss: loss + bad)


@pytest.mark.parametrize("bad", BAD)
def test_one_value_of_any_gradient_that_is_no_number(one_step, bad):
    model, optimizer, _, take = one_step
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 28
    for parameter in trained:

        def spoil(gradient):
            spoiled = gradient.clone()
            spoiled[-1, -1] = bad
            return spoiled

        hook = parameter.register_hook(spoil)
        _assert_refused(optimizer, take, "the gradient norm is")
        hook.remove()
    assert math.isfinite(take().loss)


@pytest.mark.parametrize("bad", BAD)
def test_one_value_of_any_weight_that_is_no_number(one_step, bad):
    """Of a frozen one too, where the loss depends on it."""
    model, optimizer, batches, take = one_step
    token = int(batches[0].input_ids[0, 0])
    for name, parameter in model.named_parameters():
        is_lookup = "embed_tokens" in name
        value = parameter.detach()[token if is_lookup else slice(None)].view(-1)
        kept = value[-1].clone()
        value[-1] = bad
        _assert_refused(optimizer, take, "the loss is|the gradient norm is")
        value[-1] = kept
    assert math.isfinite(take().loss)
