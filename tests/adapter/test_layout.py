"""Where llama.cpp keeps things, and what nibble refuses to lay out."""

import pytest
import torch
import transformers

from nibble.adapter.layout import extra_tensors, key_values, notes, place, problem

pytest.importorskip("gguf")


def _llama(**values):
    sizes = {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 8}
    return transformers.LlamaConfig(**{**sizes, "num_key_value_heads": 2, **values})


def _falcon(**values):
    sizes = {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 2}
    return transformers.FalconConfig(**{**sizes, "alibi": False, "bias": False, **values})


def test_rows_of_queries_and_keys():
    query = place(_llama(), "model.layers.1.self_attn.q_proj")
    assert query.name == "blk.1.attn_q"
    assert query.rows.tolist() == [h * 4 + i for h in range(4) for i in (0, 2, 1, 3)]
    key = place(_llama(), "model.layers.0.self_attn.k_proj")
    assert key.rows.tolist() == [h * 4 + i for h in range(2) for i in (0, 2, 1, 3)]
    assert place(_llama(), "model.layers.0.self_attn.v_proj").rows is None
    qwen = transformers.Qwen2Config(num_hidden_layers=2)
    assert place(qwen, "model.layers.0.self_attn.q_proj").rows is None


def test_rows_of_falcon():
    config = _falcon(new_decoder_architecture=True, num_kv_heads=2)
    rows = place(config, "transformer.h.0.self_attention.query_key_value").rows.view(-1, 4)
    heads = (rows[:, 0] // 4).tolist()
    # Two groups of two queries, a key and a value: heads 0 1 | 2 | 3 and 4 5 | 6 | 7.
    assert heads == [0, 1, 4, 5, 2, 6, 3, 7]
    assert torch.equal(rows.sort(0).values.flatten(), torch.arange(32))


def test_norms_of_gemma_are_shifted():
    gemma = transformers.Gemma2Config(num_hidden_layers=2)
    for name in ("model.norm", "model.layers.0.input_layernorm"):
        assert place(gemma, name).shift == 1.0
    assert place(gemma, "model.layers.0.mlp.up_proj").shift == 0.0
    assert place(_llama(), "model.norm").shift == 0.0


def test_llama3_factors():
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = _llama(head_dim=128, rope_parameters=rope)
    (factors,) = extra_tensors(config).values()
    frequencies = 1.0 / 500000.0 ** (torch.arange(0, 128, 2).float() / 128)
    scaled, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    torch.testing.assert_close(frequencies / factors, scaled, rtol=1e-5, atol=0)
    assert key_values(config)["llama.rope.freq_base"] == 500000.0


def test_layers_that_slide():
    usual = transformers.Gemma3TextConfig(num_hidden_layers=7)
    assert "gemma3.attention.sliding_window_pattern" not in key_values(usual)
    other = transformers.Gemma3TextConfig(
        num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"]
    )
    assert key_values(other)["gemma3.attention.sliding_window_pattern"] == [1, 0]


REFUSED = {
    "dynamic": _llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
    "activation": _llama(hidden_act="relu"),
    "gpt2": transformers.GPT2Config(),
    "one after the other": _falcon(parallel_attn=False),
    "query_pre_attn_scalar": transformers.Gemma2Config(query_pre_attn_scalar=100),
    "norm_topk_prob": transformers.Qwen3MoeConfig(norm_topk_prob=False),
    "slide": transformers.Qwen2Config(use_sliding_window=True),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_would_compute_otherwise(case):
    assert problem(REFUSED[case])


@pytest.mark.parametrize("kind", ["LlamaConfig", "Qwen3Config", "GemmaConfig", "Phi3Config"])
def test_what_it_computes(kind):
    assert problem(getattr(transformers, kind)()) == ""


def test_a_window_that_is_ignored_is_said():
    assert "4,096 tokens" in notes(transformers.MistralConfig(sliding_window=4096))[0]
    assert notes(transformers.MistralConfig(sliding_window=None)) == []
