"""Models of random weights that benchmarks train."""

from dataclasses import dataclass
from pathlib import Path

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Shape:
    """A Llama of random weights."""

    layers: int = 8
    width: int = 1024
    intermediate: int = 2816
    heads: int = 16
    kv_heads: int = 16
    vocabulary: int = 32000

    def linear_values(self) -> int:
        """Weights of the linear layers of the decoder."""
        head = self.width // self.heads
        attention = self.width * head * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.width * self.intermediate)

    def step_flops(self, tokens: int) -> float:
        """Least operations of a step without recomputation: 4PT, the head, causal attention."""
        head = 4 * tokens * self.width * self.vocabulary
        attention = 3.5 * 2 * tokens**2 * self.width * self.layers
        return 4 * self.linear_values() * tokens + head + attention


def make_folder(shape: Shape, folder: Path) -> None:
    """A checkpoint of random weights with a tokenizer of single words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=1 << 16,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    words = Tokenizer(WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="</s>"
    ).save_pretrained(folder)
