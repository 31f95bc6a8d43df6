"""Recomputing changes memory, not results."""

import pytest
import torch

from nibble.data.loader import rows_to_batch
from nibble.data.packing import pack
from nibble.errors import UsageError
from nibble.model.adapt import adapt
from nibble.model.load import load_base
from nibble.model.recompute import POLICIES, apply_recompute
from nibble.train.loss import token_loss


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


def test_unknown_policy():
    with pytest.raises(UsageError, match="offload is not available"):
        apply_recompute(torch.nn.Linear(1, 1), "offload")
