"""Recomputing changes memory, not results."""

import weakref
from collections import deque

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import LlamaConfig, LlamaForCausalLM

from nibble.data.loader import rows_to_batch
from nibble.data.packing import pack
from nibble.errors import UsageError
from nibble.kernels.target import planned_device
from nibble.model import recompute
from nibble.model.adapt import adapt
from nibble.model.load import load_base
from nibble.model.recompute import POLICIES, apply_recompute
from nibble.train.loss import token_loss


class LateCopies:
    """A side stream that copies as late as it may and holds no tensor itself."""

    def __init__(self, device):
        self._asked = deque()
        self._num_asked = 0
        self._num_done = 0

    def copy(self, target, source):
        self._asked.append((weakref.ref(target), weakref.ref(source)))
        self._num_asked += 1
        return self._num_asked

    def wait(self, done):
        while done is not None and self._num_done < done:
            target, source = (reference() for reference in self._asked.popleft())
            assert target is not None
            assert source is not None
            target.copy_(source)
            self._num_done += 1


def _deep_model(num_layers, **values):
    sizes = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_hidden_layers": num_layers,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, **values))


def _gradients(folder, policy):
    from nibble.data.chat import Example

    ids = list(range(5, 45))
    rows = pack([Example(ids, [-100, *ids[1:]], "", 0)], max_seq_len=64)
    model, _ = load_base(str(folder), "float32")
    adapt(model, rank=2, alpha=4, generator=torch.Generator().manual_seed(0))
    apply_recompute(model, policy)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss, _ = token_loss(model.train(), rows_to_batch(rows, [0]))
    loss.backward()
    return [p.grad for p in model.parameters() if p.requires_grad], len(saved)


@pytest.mark.parametrize("policy", POLICIES[1:])
def test_same_gradients_with_less_kept(tiny_model_folder, policy):
    kept, num_kept = _gradients(tiny_model_folder("llama"), "none")
    again, num_again = _gradients(tiny_model_folder("llama"), policy)
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
    assert num_again < num_kept


@pytest.mark.parametrize("family", ["falcon-40b", "gemma3", "qwen3_moe"])
def test_offload_of_other_families(tiny_model_folder, family):
    kept, _ = _gradients(tiny_model_folder(family), "none")
    again, _ = _gradients(tiny_model_folder(family), "offload")
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


@pytest.mark.parametrize("copies", [recompute.SideCopies, LateCopies])
def test_offload_waits_for_its_copies(monkeypatch, copies):
    monkeypatch.setattr(recompute, "SideCopies", copies)
    gradients = {}
    for policy in ("none", "offload"):
        model = _deep_model(6)
        apply_recompute(model, policy)
        for first in (0, 8):
            ids = torch.arange(first, first + 16)[None]
            model(ids, use_cache=False).logits.square().mean().backward()
        gradients[policy] = [p.grad for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(*gradients.values(), strict=True))


def _inputs_on_device(monkeypatch, policy, num_layers):
    """How many inputs of layers are on the device: in and after forward, and in backward."""
    model = _deep_model(num_layers)
    apply_recompute(model, policy)
    inputs, alive = [], {"forward": [], "backward": []}
    copy = recompute.SideCopies.copy

    def phase():
        return "forward" if torch._C._current_graph_task_id() == -1 else "backward"

    def count(*_):
        alive[phase()].append(sum(not reference.expired() for reference in inputs))

    def see_input(layer, args):
        inputs.append(StorageWeakRef(args[0].untyped_storage()))

    def see_copy(self, target, source):
        if phase() == "backward":
            inputs.append(StorageWeakRef(target.untyped_storage()))
        return copy(self, target, source)

    monkeypatch.setattr(recompute.SideCopies, "copy", see_copy)
    for layer in model.model.layers:
        layer.register_forward_pre_hook(see_input)
        layer.mlp.register_forward_pre_hook(count)
    loss = model(torch.arange(16)[None], use_cache=False).logits.square().mean()
    count()
    loss.backward()
    count()
    *in_forward, after_forward, after_backward = alive["forward"]
    assert after_backward == 0
    return max(in_forward), after_forward, max(alive["backward"])


def test_kept_device_bytes_do_not_grow_with_layers(monkeypatch):
    assert _inputs_on_device(monkeypatch, "full", 8) == (8, 8, 8)
    for num_layers in (4, 8):
        # transformers itself holds on to the embeddings, the first input, during forward.
        assert _inputs_on_device(monkeypatch, "offload", num_layers) == (3, 2, 2)


def test_host_memory_is_given_back(monkeypatch):
    kept = []

    def host_empty(*shape, dtype):
        tensor = torch.empty(shape, dtype=dtype)
        kept.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(recompute, "host_empty", host_empty)
    model = _deep_model(4)
    apply_recompute(model, "offload")
    for _ in range(3):
        model(torch.arange(16)[None], use_cache=False).logits.square().mean().backward()
        assert all(reference() is None for reference in kept)
    assert len(kept) == 12
    with torch.no_grad():
        model(torch.arange(16)[None], use_cache=False)
    assert len(kept) == 12


def test_gradients_twice_and_after_an_abandoned_pass():
    plain, offloaded = _deep_model(4), _deep_model(4)
    apply_recompute(offloaded, "offload")
    for model in (plain, offloaded):
        model(torch.arange(8)[None], use_cache=False)
        loss = model(torch.arange(16)[None], use_cache=False).logits.square().mean()
        loss.backward(retain_graph=True)
        loss.backward()
    for one, other in zip(plain.parameters(), offloaded.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_dropout_is_drawn_again_alike():
    def gradients(policy):
        model = _deep_model(3, attention_dropout=0.5).train()
        apply_recompute(model, policy)
        torch.manual_seed(1)
        model(torch.arange(16)[None], use_cache=False).logits.square().mean().backward()
        return [p.grad for p in model.parameters()]

    pairs = zip(gradients("none"), gradients("offload"), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_offload_runs_on_tensors_without_values():
    with planned_device("cuda"), FakeTensorMode():
        model = _deep_model(3)
        apply_recompute(model, "offload")
        model(torch.arange(16)[None], use_cache=False).logits.square().mean().backward()
        assert all(p.grad is not None for p in model.parameters())


def test_unknown_policy():
    with pytest.raises(UsageError, match="half is not available"):
        apply_recompute(torch.nn.Linear(1, 1), "half")
