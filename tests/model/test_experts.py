"""Experts against transformers, and their updates against PEFT."""

from types import SimpleNamespace

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from nibble.adapter.format import read_adapter, write_adapter
from nibble.kernels.nf4 import dequantize, quantize
from nibble.model.adapt import adapt
from nibble.model.experts import PARTS, Experts, is_experts
from nibble.model.families import head_of, hidden_states
from nibble.model.load import load_base

NUM_EXPERTS, WIDTH, INNER, NUM_TOKENS = 5, 32, 24, 13


def mixtral_experts():
    config = MixtralConfig(
        num_local_experts=NUM_EXPERTS, hidden_size=WIDTH, intermediate_size=INNER
    )
    return MixtralExperts(config)


def qwen_experts():
    config = Qwen3MoeConfig(num_experts=NUM_EXPERTS, hidden_size=WIDTH, moe_intermediate_size=INNER)
    return Qwen3MoeExperts(config)


def random_experts(make=mixtral_experts):
    torch.manual_seed(0)
    reference = make().requires_grad_(False)
    for parameter in reference.parameters():
        parameter.normal_(std=0.3)
    reference.config = SimpleNamespace(_experts_implementation="eager")
    return reference


def routed():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(NUM_TOKENS, WIDTH, generator=generator)
    # Expert 3 gets no token.
    scores = torch.rand(NUM_TOKENS, NUM_EXPERTS, generator=generator).index_fill(
        1, torch.tensor([3]), -1
    )
    weights, index = scores.topk(2)
    return x, index, weights


def weights_of(reference):
    return {part: getattr(reference, part).detach() for part in PARTS}


def test_experts_with_a_gate_of_their_own_are_left_to_transformers():
    class ClampedExperts(MixtralExperts):
        def _apply_gate(self, gate_up):
            gate, up = gate_up.clamp(-1, 1).chunk(2, dim=-1)
            return self.act_fn(gate) * up

    reference = random_experts()
    assert is_experts(reference)
    reference.__class__ = ClampedExperts
    assert not is_experts(reference)
    reference = random_experts()
    reference.is_concatenated = False
    assert not is_experts(reference)


@pytest.mark.parametrize("make", [mixtral_experts, qwen_experts])
def test_forward_and_gradient_equal_transformers(make):
    reference = random_experts(make)
    experts = Experts(reference, weights_of(reference))
    x, index, weights = routed()
    results = []
    for module in (reference, experts):
        inputs = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
        y = module(inputs[0], index, inputs[1])
        results.append((y, *torch.autograd.grad((y * x.flip(0)).sum(), inputs)))
    for ours, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_dropped_tokens_get_nothing():
    reference = random_experts()
    experts = Experts(reference, weights_of(reference))
    x, index, weights = routed()
    y = experts(x, index.index_fill(0, torch.tensor([4]), NUM_EXPERTS), weights)
    assert torch.count_nonzero(y[4]) == 0


@pytest.mark.parametrize("double", [True, False])
def test_stored_in_4_bits_equals_the_dequantised_weight(double):
    reference = random_experts()
    stored = {part: quantize(w, double=double) for part, w in weights_of(reference).items()}
    dense = {part: dequantize(q, dtype=torch.float32) for part, q in stored.items()}
    x, index, weights = routed()
    outcomes = []
    for given in (stored, dense):
        torch.manual_seed(3)
        experts = Experts(reference, given)
        experts.add_lora(rank=2, alpha=4)
        torch.nn.init.normal_(experts.down_proj.lora_B)
        torch.nn.init.normal_(experts.gate_up_proj.lora_B)
        x_in = x.clone().requires_grad_()
        y = experts(x_in, index, weights)
        factors = [p for p in experts.parameters() if p.requires_grad]
        assert len(factors) == 4
        outcomes.append((y, *torch.autograd.grad(y.square().sum(), [x_in, *factors])))
    for ours, theirs in zip(*outcomes, strict=True):
        assert torch.equal(ours, theirs)


def test_new_updates_change_nothing_and_are_drawn_from_the_generator():
    reference = random_experts()
    experts = Experts(reference, weights_of(reference))
    x, index, weights = routed()
    before = experts(x, index, weights)
    experts.add_lora(rank=3, alpha=6, generator=torch.Generator().manual_seed(5))
    assert torch.equal(experts(x, index, weights), before)
    again = Experts(reference, weights_of(reference))
    again.add_lora(rank=3, alpha=6, generator=torch.Generator().manual_seed(5))
    assert torch.equal(again.down_proj.lora_A, experts.down_proj.lora_A)
    assert experts.down_proj.lora_A.abs().max() <= INNER**-0.5


def test_the_update_is_that_of_the_formula():
    reference = random_experts()
    weights = weights_of(reference)
    experts = Experts(reference, weights)
    experts.add_lora(rank=3, alpha=6)
    for part in PARTS:
        torch.nn.init.normal_(getattr(experts, part).lora_B)
    merged = {}
    for part, base in weights.items():
        factors = getattr(experts, part).factors()
        merged[part] = base + torch.stack([2.0 * (B @ A) for A, B in factors])
    x, index, top_k_weights = routed()
    expected = Experts(reference, merged)(x, index, top_k_weights)
    torch.testing.assert_close(experts(x, index, top_k_weights), expected, rtol=1e-5, atol=1e-4)


def test_saves_no_dense_weight_for_backward():
    reference = random_experts()
    experts = Experts(reference, {k: quantize(w) for k, w in weights_of(reference).items()})
    experts.add_lora(rank=1, alpha=1)
    x, index, weights = routed()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(tuple(t.shape)) or t, lambda t: t
    ):
        experts(x.requires_grad_(), index, weights)
    assert (2 * INNER, WIDTH) not in saved
    assert (WIDTH, INNER) not in saved


def test_is_experts_knows_the_layout():
    assert is_experts(random_experts())
    assert not is_experts(torch.nn.Linear(2, 2))


def batch_of(num_tokens):
    generator = torch.Generator().manual_seed(2)
    return SimpleNamespace(
        input_ids=torch.randint(5, 261, (1, num_tokens), generator=generator),
        position_ids=torch.arange(num_tokens)[None],
        cu_seq_lens=torch.tensor([0, num_tokens]),
    )


@torch.no_grad()
def logits_of(model, batch):
    return head_of(model).logits(hidden_states(model, batch))


@pytest.mark.parametrize("target", ["all-linear", ["experts"], ["q_proj", "experts"]])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_opens_our_adapter(family, target, rslora, tiny_model_folder, tmp_path):
    folder = tiny_model_folder(family)
    model, _ = load_base(str(folder), storage="float32")
    torch.manual_seed(0)
    adapt(model, rank=4, alpha=8, dropout=0.1, target=target, rslora=rslora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    batch = batch_of(9)
    expected = logits_of(model, batch)
    write_adapter(model, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain = base(batch.input_ids).logits[0].detach()
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    with torch.no_grad():
        logits = theirs(input_ids=batch.input_ids).logits[0]
    assert (logits - plain).abs().max() > 0.1
    torch.testing.assert_close(expected, logits, rtol=1e-5, atol=1e-5)
    again, _ = load_base(str(folder), storage="float32")
    read_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits_of(again, batch), expected)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_we_open_an_adapter_of_peft(family, tiny_model_folder, tmp_path):
    folder = tiny_model_folder(family)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        init_lora_weights=False,
    )
    torch.manual_seed(0)
    theirs = peft.get_peft_model(base, config)
    theirs.save_pretrained(tmp_path)
    batch = batch_of(9)
    with torch.no_grad():
        expected = theirs(input_ids=batch.input_ids).logits[0]
    model, _ = load_base(str(folder), storage="float32")
    read_adapter(model, tmp_path)
    torch.testing.assert_close(logits_of(model, batch), expected, rtol=1e-4, atol=1e-4)
