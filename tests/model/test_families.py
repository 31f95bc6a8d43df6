"""Every first-class family: the same logits as transformers, and no leak between documents."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, FalconConfig

from nibble.errors import ModelError
from nibble.model.families import decoder_layers, family_of, head_of, hidden_states
from nibble.model.ledger import resident_bytes
from nibble.model.load import load_base
from nibble.model.recompute import apply_recompute

FAMILIES = (
    "llama", "mistral", "falcon-7b", "falcon-40b", "qwen2", "qwen3", "gemma", "gemma2", "gemma3",
    "phi3", "mixtral", "qwen3_moe",
)  # fmt: skip


def packed(*lengths: int) -> SimpleNamespace:
    """A batch of random documents, the shape that the loader gives."""
    generator = torch.Generator().manual_seed(sum(lengths))
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return SimpleNamespace(
        input_ids=torch.randint(5, 261, (1, sum(lengths)), generator=generator),
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        cu_seq_lens=ends.to(torch.int32),
    )


def document(batch: SimpleNamespace, index: int) -> SimpleNamespace:
    start, stop = batch.cu_seq_lens[index : index + 2].tolist()
    return SimpleNamespace(
        input_ids=batch.input_ids[:, start:stop],
        position_ids=batch.position_ids[:, start:stop],
        cu_seq_lens=torch.tensor([0, stop - start], dtype=torch.int32),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_transformers(family, tiny_model_folder):
    folder = tiny_model_folder(family)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    reference.eval()
    model, _ = load_base(str(folder), storage="float32")
    batch = packed(11)
    with torch.no_grad():
        expected = reference(batch.input_ids, use_cache=False).logits[0]
        logits = head_of(model).logits(hidden_states(model, batch))
        with_cache = model(batch.input_ids).logits[0]
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(with_cache, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_logits_are_those_of_transformers_within_rounding(family, tiny_model_folder):
    folder = tiny_model_folder(family)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    model, _ = load_base(str(folder))
    batch = packed(11)
    with torch.no_grad():
        expected = reference(batch.input_ids, use_cache=False).logits[0].float()
        logits = head_of(model).logits(hidden_states(model, batch)).float()
    # Rounding may turn a router's near tie in one token; the others do not see it.
    errors_T = (logits - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert errors_T.median() < 0.02


@pytest.mark.parametrize("policy", ["none", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_are_separate(family, policy, tiny_model_folder):
    model, _ = load_base(str(tiny_model_folder(family)), storage="float32")
    embeddings = model.get_input_embeddings().weight.requires_grad_()
    apply_recompute(model, policy)
    torch.manual_seed(0)
    batch = packed(1, 7, 7, 3, 12)
    together = hidden_states(model, batch)
    weights = torch.randn_like(together)
    (gradient,) = torch.autograd.grad((together * weights).sum(), embeddings)
    parts = [hidden_states(model, document(batch, i)) for i in range(5)]
    separate = torch.cat(parts)
    (expected,) = torch.autograd.grad((separate * weights).sum(), embeddings)
    torch.testing.assert_close(together, separate, rtol=0, atol=4e-6)
    # By the norm: single values that cancel out carry rounding of many times their own size.
    assert (gradient - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("storage", ["nf4", "fp4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_and_expert_is_stored_in_4_bits(family, storage, tiny_model_folder):
    model, _ = load_base(str(tiny_model_folder(family)), storage=storage)
    kinds = {kind.partition(" ")[2] for kind in resident_bytes(model)}
    allowed = {"embeddings", "head", "norms", "biases", "routers", "tables"}
    stored = {"codes", "absmax", "nested absmax", "offsets"}
    assert kinds <= allowed | stored
    assert kinds >= stored
    hidden = hidden_states(model, packed(5, 6))
    assert torch.isfinite(hidden).all()
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_decoder_layers_of_falcon_stand_elsewhere(tiny_model_folder):
    model, _ = load_base(str(tiny_model_folder("falcon-7b")))
    assert len(decoder_layers(model)) == 2


def test_alibi_is_refused():
    with pytest.raises(ModelError, match="ALiBi"):
        family_of(FalconConfig(alibi=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_full_training_runs_in_16_bit_products(family, tiny_model_folder):
    model, _ = load_base(str(tiny_model_folder(family)), storage="float32", trainable=True)
    batch = packed(5, 5, 9)
    exact = hidden_states(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = hidden_states(model.train(), batch)
    hidden.float().square().sum().backward()
    errors_T = (hidden - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert errors_T.median() < 0.05
    untouched = [name for name, p in model.named_parameters() if p.grad is None]
    assert untouched in ([], ["lm_head.weight"])
