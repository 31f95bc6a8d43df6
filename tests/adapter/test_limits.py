"""What servers accept, asked in one place."""

import pytest

from nibble.adapter.limits import VLLM_RANKS, Update, check_limits, vllm_rank
from nibble.errors import UsageError


@pytest.mark.parametrize("rank", VLLM_RANKS)
def test_ranks_of_vllm(rank):
    assert vllm_rank(rank) == rank
    assert check_limits("vllm", Update(rank), "llama") == []


def test_a_rank_between_is_served_as_the_next():
    assert vllm_rank(2) == 8
    (note,) = check_limits("vllm", Update(24), "qwen3")
    assert "served as rank 32" in note


REFUSED = {
    "rank": ("vllm", Update(513), "llama", r"rank 513 is above 512.*\n.*lora\.rank=512"),
    "family": ("vllm", Update(8), "falcon", "no adapters of falcon"),
    "experts": ("vllm", Update(8, has_experts=True), "mixtral", "changes experts"),
    "head": ("vllm", Update(8, ["q_proj", "lm_head"]), "llama", "no adapter of lm_head"),
    "embeddings": ("gguf", Update(8, ["model.embed_tokens"]), "llama", "embed_tokens"),
    "target": ("tgi", Update(8), "llama", "unknown target 'tgi'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_say_how_to_go_on(case):
    target, update, family, message = REFUSED[case]
    with pytest.raises(UsageError, match=message) as error:
        check_limits(target, update, family)
    assert error.value.exit_code == 2
    assert error.value.fix


def test_gguf_takes_any_rank():
    assert check_limits("gguf", Update(1000), "falcon") == []


def test_ollama_takes_merged_models():
    assert "merge it" in check_limits("ollama", Update(8), "llama")[0]
