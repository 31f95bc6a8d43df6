"""Fixtures that several rooms share."""

import os
from collections.abc import Callable
from pathlib import Path

# Spin barriers on a busy machine turn a 0.1 s step into seconds.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# As many workers as cores run side by side, one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, settings

# A busy machine draws examples slowly; that says nothing of the code.
settings.register_profile("nibble", suppress_health_check=[HealthCheck.too_slow])
settings.register_profile(
    "torture",
    suppress_health_check=[HealthCheck.too_slow],
    max_examples=10_000,
    deadline=1000,
    database=None,
)
# Tests marked torture have a longer version, which `make torture` runs.
IS_TORTURE = os.environ.get("NIBBLE_TORTURE") == "1"
settings.load_profile("torture" if IS_TORTURE else "nibble")

SHARED = Path(__file__).resolve().parents[2] / "shared"

_SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_FALCON = {
    **{key: _SIZES[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers")},
    "num_attention_heads": 4,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "alibi": False,
    "bias": False,
}
# One sliding layer and one full layer, the window shorter than the documents of the tests.
_SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
# transformers config class and its values, per first-class family.
TINY_MODELS = {
    "llama": ("LlamaConfig", {**_SIZES, "tie_word_embeddings": False}),
    "mistral": ("MistralConfig", {**_SIZES, "sliding_window": 4}),
    "falcon-7b": ("FalconConfig", {**_FALCON, "multi_query": True, "parallel_attn": True}),
    "falcon-40b": (
        "FalconConfig",
        {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "qwen2": ("Qwen2Config", {**_SIZES}),
    "qwen3": ("Qwen3Config", {**_SIZES}),
    "gemma": ("GemmaConfig", {**_SIZES}),
    "gemma2": ("Gemma2Config", {**_SIZES, **_SLIDING, "query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3TextConfig", {**_SIZES, **_SLIDING, "query_pre_attn_scalar": 16}),
    "phi3": ("Phi3Config", {**_SIZES, "sliding_window": 4}),
    "mixtral": ("MixtralConfig", {**_SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {
            **_SIZES,
            "moe_intermediate_size": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
        },
    ),
}
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real models and data beside the project; skips where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("needs the folder ../shared with real models and data")
    return SHARED


@pytest.fixture(scope="session")
def is_torture() -> bool:
    """Whether the long version of a test is wanted."""
    return IS_TORTURE


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes, once a session, the folder of a tiny random float32 model of a family.

    The names are those of TINY_MODELS. Do not write into the folder: copy it.
    """
    made: dict[str, Path] = {}

    def folder_of(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            _write_tiny_model(family, made[family])
        return made[family]

    return folder_of


def _write_tiny_model(family: str, folder: Path) -> None:
    import torch
    import transformers

    kind, values = TINY_MODELS[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(transformers, kind)(**values)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn_like(parameter)
                if parameter.ndim == 1:
                    parameter.add_(0.1 * noise)
                else:
                    parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    _tiny_tokenizer().save_pretrained(folder)


def _tiny_tokenizer():
    """Byte by byte, with the special tokens that the template uses: 261 ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
    names = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=_CHAT_TEMPLATE,
    )
