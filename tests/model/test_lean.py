"""Lean layers change what is kept, not what is computed."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from nibble.kernels.rotary import rotary
from nibble.model.adapt import adapt
from nibble.model.families import head_of, hidden_states
from nibble.model.lean import use_lean_layers
from nibble.model.load import load_base
from nibble.model.recompute import apply_recompute

FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "mixtral",
    "qwen3_moe", "falcon-7b",
)  # fmt: skip
UNCHANGED = {"falcon-7b"}  # layer norms and no gate
LENGTHS = (5, 12, 7)


def outcome(folder, *, is_lean, recompute="none", dtype=torch.float32, lengths=LENGTHS):
    torch.manual_seed(0)
    model, _ = load_base(str(folder), "float32" if dtype == torch.float32 else "bf16")
    adapt(model, rank=4, generator=torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(1), std=0.1)
    if is_lean:
        use_lean_layers(model)
    apply_recompute(model, recompute)
    model.train()
    ends = torch.tensor([0, *lengths]).cumsum(0)
    generator = torch.Generator().manual_seed(2)
    batch = SimpleNamespace(
        input_ids=torch.randint(5, 261, (1, sum(lengths)), generator=generator),
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        cu_seq_lens=ends.to(torch.int32),
    )
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        hidden = hidden_states(model, batch)
    logits = head_of(model).logits(hidden)
    logits.float().square().mean().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), gradients, sum(kept.values())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_same_values_and_less_kept(tiny_model_folder, family, recompute):
    folder = tiny_model_folder(family)
    plain, lean = (outcome(folder, is_lean=x, recompute=recompute) for x in (False, True))
    torch.testing.assert_close(lean[0], plain[0], rtol=1e-5, atol=1e-5)
    assert lean[1].keys() == plain[1].keys()
    for name, gradient in plain[1].items():
        torch.testing.assert_close(lean[1][name], gradient, rtol=2e-4, atol=1e-6)
    if recompute == "none" and family not in UNCHANGED:
        assert lean[2] < plain[2]
    elif recompute == "none":
        assert lean[2] == plain[2]


def test_a_layer_keeps_the_floor(tiny_model_folder):
    """4D + 2KV + 2F values a token and layer, R of each product, and one float32 of each norm."""
    folder = tiny_model_folder("llama")
    config = AutoModelForCausalLM.from_pretrained(folder).config
    width, num_layers, rank = config.hidden_size, config.num_hidden_layers, 4
    head = width // config.num_attention_heads
    floor = 4 * width + 2 * config.num_key_value_heads * head + 2 * config.intermediate_size
    # The input of the final norm, its float32, and the rotations.
    once = 2 * width + 4 + 4 * head

    def bytes_a_token(is_lean):
        short, long = (
            outcome(folder, is_lean=is_lean, dtype=torch.bfloat16, lengths=lengths)[2]
            for lengths in (LENGTHS, 2 * LENGTHS)
        )
        return (long - short) / sum(LENGTHS)

    least = num_layers * (2 * floor + 7 * 2 * rank + 2 * 4)
    assert least <= bytes_a_token(is_lean=True) <= least + once
    assert bytes_a_token(is_lean=False) > 1.5 * least


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in UNCHANGED])
def test_bfloat16_is_as_exact_as_before(tiny_model_folder, family):
    folder = tiny_model_folder(family)
    exact = outcome(folder, is_lean=False)
    plain, lean = (outcome(folder, is_lean=x, dtype=torch.bfloat16) for x in (False, True))

    def error(found):
        errors = [(found[0].float() - exact[0]).norm() / exact[0].norm()]
        errors += [(found[1][n] - g).norm() / g.norm() for n, g in exact[1].items() if g.norm() > 0]
        return torch.stack(errors).mean()

    assert error(lean) < 1.3 * error(plain)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in UNCHANGED])
def test_rotations_are_ours_in_this_model_alone(tiny_model_folder, family):
    used, unused = (load_base(str(tiny_model_folder(family)))[0] for _ in range(2))
    use_lean_layers(used)
    (attention, *_), (other, *_) = (
        [m for m in model.modules() if type(m).__name__.endswith("Attention")]
        for model in (used, unused)
    )
    assert attention.forward.func.__globals__["apply_rotary_pos_emb"] is rotary
    assert other.forward.__func__.__globals__["apply_rotary_pos_emb"] is not rotary
