"""Embeddings in host memory are the same embeddings."""

import pytest
import torch
from torch import nn

from nibble.errors import UsageError
from nibble.kernels.target import planned_device
from nibble.model.host_embedding import HostEmbedding
from nibble.model.ledger import resident_bytes
from nibble.model.load import load_base


def load(folder, storage="bf16"):
    """As on a CUDA device: on a CPU the host is where everything is."""
    with planned_device("cuda"):
        return load_base(str(folder), storage, host_embeddings=True)[0]


@pytest.mark.parametrize("storage", ["bf16", "nf4", "float32"])
def test_same_logits_and_ledger(tiny_model_folder, storage):
    folder = tiny_model_folder("llama")
    ids = torch.arange(3, 20)[None]
    model, (plain, _) = load(folder, storage), load_base(str(folder), storage)
    assert isinstance(model.get_input_embeddings(), HostEmbedding)
    assert torch.equal(model(ids).logits, plain(ids).logits)
    assert resident_bytes(model) == resident_bytes(plain)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_on_a_cpu_nothing_changes(tiny_model_folder):
    model, _ = load_base(str(tiny_model_folder("llama")), host_embeddings=True)
    assert type(model.get_input_embeddings()) is nn.Embedding


@pytest.mark.parametrize("family", ["gemma", "falcon-7b"])
def test_a_tied_table_is_refused(tiny_model_folder, family):
    with pytest.raises(UsageError, match="needs its embeddings on the device"):
        load(tiny_model_folder(family))


def test_trained_embeddings_are_refused(tiny_model_folder):
    folder = str(tiny_model_folder("llama"))
    with pytest.raises(UsageError, match="embeddings that are trained"):
        load_base(folder, "float32", trainable=True, host_embeddings=True)


@pytest.mark.gpu
def test_rows_arrive_on_the_device():
    table = torch.randn(10, 4)
    found = HostEmbedding(table)(torch.tensor([[3, 1]], device="cuda"))
    assert found.is_cuda
    assert torch.equal(found.cpu(), table[[3, 1]][None])
