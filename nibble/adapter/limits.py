"""What vLLM, Ollama and llama.cpp accept: asked before training, and again before export.

    check_limits("vllm", update, family)    refuses, or returns what is worth knowing

Source:
    vLLM: vllm/config/lora.py (ranks) and vllm/lora/peft_helper.py (features), 0.26; the table of
    models with LoRA in docs/models/supported_models.md.
    Ollama: pull request 14969 of September 2026 (0.34.1): no models out of adapters any more.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from nibble.errors import UsageError

TARGETS = ("gguf", "ollama", "vllm")
# The values that --max-lora-rank takes; an adapter of a lower rank is padded to it.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_VLLM_FAMILIES = {
    "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text",
    "phi3",
}  # fmt: skip
_HEADS = ("lm_head", "embed_tokens", "word_embeddings")


@dataclass(frozen=True)
class Update:
    """What a server has to know of an adapter, or of a run that will make one.

    Args:
        rank: R.
        layers: Names, or last segments of names, of adapted layers; empty where not known yet.
        has_experts: Whether the experts of a mixture model are adapted.
    """

    rank: int
    layers: Sequence[str] = ()
    has_experts: bool = False


def check_limits(target: str, update: Update, family: str) -> list[str]:
    """Refuse an adapter that `target` would not load.

    Args:
        target: One of TARGETS.
        family: model_type of the base.

    Returns:
        Sentences about what works, but not as one may expect.

    Raises:
        UsageError: It names the limit, and the nearest value that is accepted.
    """
    if target not in TARGETS:
        raise UsageError(f"unknown target {target!r}", fix=f"use one of {', '.join(TARGETS)}")
    heads = [name for name in update.layers if name.rpartition(".")[2] in _HEADS]
    if heads:
        raise UsageError(
            f"{target} takes no adapter of {heads[0]}",
            fix="leave it out of lora.target, or merge the adapter and serve the merged model",
        )
    if target == "vllm":
        return _check_vllm(update, family)
    if target == "ollama":
        return [
            "Ollama 0.34.1 and newer make no model out of an adapter: merge it, and export with "
            "--merged"
        ]
    return []


def vllm_rank(rank: int) -> int:
    """The lowest --max-lora-rank that holds an adapter of this rank.

    >>> vllm_rank(24)
    32

    Raises:
        UsageError: If it is above the highest.
    """
    fitting = [largest for largest in VLLM_RANKS if largest >= rank]
    if not fitting:
        raise UsageError(
            f"rank {rank} is above {VLLM_RANKS[-1]}, the highest that vLLM serves "
            f"(its ranks are {', '.join(map(str, VLLM_RANKS))})",
            fix=f"use lora.rank={VLLM_RANKS[-1]}, or merge the adapter and serve the merged model",
        )
    return fitting[0]


def _check_vllm(update: Update, family: str) -> list[str]:
    served = vllm_rank(update.rank)
    if family not in _VLLM_FAMILIES:
        raise UsageError(
            f"vLLM serves no adapters of {family}",
            fix="merge the adapter and serve the merged model, or use `nibble serve`",
        )
    if update.has_experts:
        raise UsageError(
            "the adapter changes experts, whose stacked factors not every vLLM reads",
            fix="use lora.target=[q_proj,k_proj,v_proj,o_proj], or merge and serve that",
        )
    if served == update.rank:
        return []
    return [f"rank {update.rank} is none of vLLM's: it is served as rank {served}, with its memory"]
