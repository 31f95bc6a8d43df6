"""The feed-forward part of the last layer: what is read stays as it was."""

import pytest
import torch

from nibble.data.chat import Example
from nibble.data.loader import rows_to_batch
from nibble.data.packing import pack
from nibble.model.adapt import adapt
from nibble.model.families import decoder_layers, hidden_states
from nibble.model.lean import use_lean_layers
from nibble.model.load import load_base
from nibble.model.read_rows import use_read_rows
from nibble.model.recompute import POLICIES, apply_recompute
from nibble.train.loss import token_loss, token_metrics

KNOWN = ["llama", "qwen3", "gemma3", "phi3", "qwen3_moe"]
READ = [2, 3, 11, 12, 13, 14]  # tokens before those that have a label


def _batch():
    ids = list(range(5, 25))
    first = Example(ids[:10], [-100, -100, -100, *ids[3:5], *[-100] * 5], "", 0)
    second = Example(ids[10:], [-100, -100, *ids[12:16], *[-100] * 4], "", 1)
    rows = pack([first, second], max_seq_len=64)
    return rows_to_batch(rows, range(len(rows)))


def _model(folder, policy="none", *, by_rows=True):
    model, _ = load_base(str(folder), "float32")
    adapt(model, rank=2, alpha=4, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.uniform_(-0.1, 0.1, generator=generator)
    use_lean_layers(model)
    if by_rows:
        use_read_rows(model)
    apply_recompute(model, policy)
    return model.train()


def _count_tokens(model):
    """How many tokens each call of the last gated unit sees."""
    seen = []
    part = decoder_layers(model)[-1].mlp
    part.down_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1]))
    return seen


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", KNOWN)
def test_loss_and_gradients_are_those_of_all_tokens(tiny_model_folder, family, policy):
    found = []
    for by_rows in (True, False):
        model = _model(tiny_model_folder(family), policy, by_rows=by_rows)
        loss, _ = token_loss(model, _batch())
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-6)


def test_only_tokens_that_are_read_are_worked_on(tiny_model_folder):
    model = _model(tiny_model_folder("llama"))
    seen = _count_tokens(model)
    token_loss(model, _batch())[0].backward()
    token_metrics(model, _batch())
    assert seen == [len(READ)] * 2


def test_hidden_states_are_whole_where_nothing_is_said(tiny_model_folder):
    folder, batch = tiny_model_folder("llama"), _batch()
    model = _model(folder)
    token_loss(model, batch)
    whole, plain = hidden_states(model, batch), hidden_states(_model(folder, by_rows=False), batch)
    assert torch.equal(whole, plain)
    read = torch.tensor(READ)
    some = hidden_states(model, batch, read)
    torch.testing.assert_close(some[read], plain[read])
    assert not torch.allclose(some, plain)


@pytest.mark.parametrize("family", ["falcon-7b", "mixtral"])
def test_other_layers_stay_as_they_are(tiny_model_folder, family):
    model = _model(tiny_model_folder(family))
    batch = _batch()
    expected = hidden_states(model, batch)
    assert torch.equal(hidden_states(model, batch, torch.tensor(READ)), expected)


def test_an_error_leaves_the_part_as_it_was(tiny_model_folder):
    model = _model(tiny_model_folder("llama"))
    part = decoder_layers(model)[-1].mlp
    before = part.forward
    with pytest.raises(RuntimeError, match="99"):
        hidden_states(model, _batch(), torch.tensor([99]))
    assert part.forward is before
