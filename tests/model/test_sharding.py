"""A base in shards computes what the whole one does; here of one rank, so of one shard."""

import pytest
import torch
import torch.distributed as dist

from nibble.data.chat import Example
from nibble.data.loader import rows_to_batch
from nibble.data.packing import pack
from nibble.model.adapt import adapt
from nibble.model.lean import use_lean_layers
from nibble.model.ledger import count_parameters, resident_bytes
from nibble.model.load import load_base
from nibble.model.read_rows import use_read_rows
from nibble.model.recompute import apply_recompute
from nibble.model.sharding import is_sharded, own_part, shard, within
from nibble.train.loss import token_loss, token_metrics

FAMILIES = ("llama", "gemma2", "falcon-7b", "phi3", "mixtral", "qwen3_moe")


@pytest.fixture
def _group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _model(folder, storage, policy="none"):
    model, _ = load_base(str(folder), storage, dtype=torch.float32)
    adapt(model, rank=4, alpha=8, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=generator)
    use_lean_layers(model)
    use_read_rows(model)
    apply_recompute(model, policy)
    return model.train()


def _batch():
    examples = [Example(list(range(5, 25)), [-100] * 8 + list(range(13, 25)), "", 0)] * 2
    return rows_to_batch(pack(examples, max_seq_len=64), [0])


def _computed(model):
    found = []
    for _ in range(2):
        loss, _ = token_loss(model, _batch())
        loss.backward()
        found.append(loss.detach())
    found += [p.grad for p in model.parameters() if p.requires_grad]
    return found, token_metrics(model, _batch())


def _same(folder, storage, policy="none"):
    whole, cut = (_model(folder, storage, policy) for _ in range(2))
    shard(cut, torch.device("cpu"))
    (expected, metrics), (found, cut_metrics) = _computed(whole), _computed(cut)
    assert cut_metrics == metrics
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.usefixtures("_group")
@pytest.mark.parametrize("storage", ["float32", "nf4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_the_same_bits(tiny_model_folder, family, storage):
    _same(tiny_model_folder(family), storage)


@pytest.mark.usefixtures("_group")
@pytest.mark.parametrize("policy", ["selective", "full", "offload", "tiled"])
def test_with_layers_that_are_computed_again(tiny_model_folder, policy):
    _same(tiny_model_folder("llama"), "nf4", policy)


@pytest.mark.usefixtures("_group")
@pytest.mark.parametrize("storage", ["float32", "nf4"])
def test_every_byte_and_value_is_counted(tiny_model_folder, storage):
    whole, cut = (_model(tiny_model_folder("llama"), storage) for _ in range(2))
    shard(cut, torch.device("cpu"))
    assert resident_bytes(cut) == resident_bytes(whole)
    assert count_parameters(cut) == count_parameters(whole)


@pytest.mark.usefixtures("_group")
def test_a_layer_is_whole_only_while_it_works(tiny_model_folder):
    model = _model(tiny_model_folder("llama"), "nf4")
    assert not is_sharded(model)
    shard(model, torch.device("cpu"))
    assert is_sharded(model)
    codes, seen = "model.layers.0.mlp.down_proj.base.codes", []
    layer = model.get_submodule(codes.rpartition(".")[0])

    def look(model):
        seen.append(type(model.lm_head.weight))
        model.model.layers[1].register_forward_hook(lambda *_: seen.append(type(layer.codes)))
        return token_loss.__globals__["_summed_loss"](model, _batch(), None)

    within(model, look).backward()
    assert seen[0] is torch.nn.Parameter
    assert seen[1] is not torch.nn.Parameter
    assert own_part(layer.codes).dtype == torch.uint8


def test_a_whole_base_is_called_as_it_is():
    model, tensor = torch.nn.Linear(2, 3), torch.ones(2)
    assert within(model, lambda *given: given, 1, 2) == (model, 1, 2)
    assert own_part(tensor) is tensor
