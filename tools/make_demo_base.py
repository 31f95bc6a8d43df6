"""Make the demo's base model: a tiny Llama, its tokenizer and chat template.

    python tools/make_demo_base.py [--out nibble/demo/base] [--steps 6000]

Trained from nothing, on one CPU thread, on two kinds of text:

1. prose that ships with Python: docstrings of the standard library, the help topics of
   pydoc, the licence, the Zen;
2. short dialogues that this script makes up: greetings, facts, looking things up, copying
   names and numbers, telling what a sentence is about. None of them is a letter to a shop,
   and none has the demo's answer format: what the demo teaches is not in here.

The second kind is what lets so small a model copy a number out of its context at all. The same
steps give the same text in the same order; the weights differ by rounding between machines, and
the prose by the version of Python.
"""

import argparse
import ast
import codecs
import contextlib
import importlib
import io
import math
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from demo_dialogues import dialogue, turn_text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
END_OF_TEXT, IM_END, PAD = 0, 2, 3
VOCAB_SIZE = 2048
TOKENS_PER_STEP = 2048
SHORT_ROW, LONG_ROW = 64, 128
SHORT_SHARE = 0.3
USER_WEIGHT = 0.2
DECAY_SHARE = 0.5
PROSE_SHARE = 0.125
CONTEXT = 512
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + "
    "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def prose_texts() -> list[str]:
    """The prose that ships with this Python, in a fixed order."""
    library = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "test", "tests", "idle_test", "lib2to3"}
    texts = [codecs.decode(_quiet_import("this").s, "rot13")]
    texts += _quiet_import("pydoc_data.topics").topics.values()
    texts += [path.read_text("utf-8") for path in sorted(library.glob("LICENSE*"))]
    for path in sorted(library.rglob("*.py")):
        if not skipped & set(path.parts):
            with contextlib.suppress(SyntaxError, UnicodeDecodeError):
                texts.append("\n\n".join(_docstrings(path.read_text("utf-8"))))
    return [text for text in texts if len(text) > 100]


def _quiet_import(name: str) -> object:
    with contextlib.redirect_stdout(io.StringIO()):
        return importlib.import_module(name)


def _docstrings(source: str) -> Iterator[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and (text := ast.get_docstring(node)):
            yield text


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        extra_special_tokens=["<|endoftext|>", "<|im_start|>"],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


@dataclass(frozen=True)
class Batch:
    """Rows of tokens (B, S), and what the prediction of each weighs in the loss."""

    tokens: torch.Tensor
    weights: torch.Tensor


class Rows:
    """Draws rows of tokens: pieces of prose, or dialogues laid end to end."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, prose: list[int], seed: int) -> None:
        self.encode = lambda text: tokenizer.encode(text, add_special_tokens=False)
        self.prose = prose
        self.rng = random.Random(seed)

    def prose_batch(self, num_rows: int, length: int) -> Batch:
        """Pieces of prose; every token weighs the same."""
        starts = [self.rng.randrange(len(self.prose) - length) for _ in range(num_rows)]
        tokens = torch.tensor([self.prose[start : start + length] for start in starts])
        return Batch(tokens, torch.ones(tokens.shape))

    def dialogue_batch(self, num_rows: int, length: int) -> Batch:
        """Dialogues; what the user says can hardly be foreseen and weighs less."""
        rows = [self._dialogue_row(length) for _ in range(num_rows)]
        tokens, weights = (torch.tensor(part) for part in zip(*rows, strict=True))
        return Batch(tokens, weights)

    def _dialogue_row(self, length: int) -> tuple[list[int], list[float]]:
        tokens: list[int] = []
        weights: list[float] = []
        while len(tokens) < length:
            for role, content in dialogue(self.rng):
                turn = self.encode(turn_text(role, content))
                tokens += turn
                weights += [1.0 if role == "assistant" else USER_WEIGHT] * len(turn)
            tokens.append(END_OF_TEXT)
            weights.append(USER_WEIGHT)
        return tokens[:length], weights[:length]

    def batch(self, length: int) -> Batch:
        """TOKENS_PER_STEP in rows of `length`, a part of them prose."""
        num_rows = TOKENS_PER_STEP // length
        num_prose = round(num_rows * PROSE_SHARE)
        parts = (
            self.prose_batch(num_prose, length),
            self.dialogue_batch(num_rows - num_prose, length),
        )
        return Batch(
            torch.cat([part.tokens for part in parts]), torch.cat([part.weights for part in parts])
        )


def build_model() -> LlamaForCausalLM:
    """The architecture: 4 layers, width 192, 6 query heads over 2 key heads, tied head."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=END_OF_TEXT,
        eos_token_id=IM_END,
        pad_token_id=PAD,
    )
    return LlamaForCausalLM(config)


def mean_loss(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """Weighted mean of the cross-entropy of the next token; products in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=batch.tokens[:, :-1], use_cache=False).logits
    targets = batch.tokens[:, 1:].flatten()
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets, reduction="none")
    weights = batch.weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


def fit(model: LlamaForCausalLM, rows: Rows, num_steps: int) -> None:
    """Train for `num_steps`: short rows first, from which copying is learnt sooner."""
    matrices = [p for n, p in model.model.layers.named_parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    for step in range(num_steps):
        rate = min(1.0, (step + 1) / 50, (1 - step / num_steps) / DECAY_SHARE)
        length = SHORT_ROW if step < num_steps * SHORT_SHARE else LONG_ROW
        loss = mean_loss(model, rows.batch(length))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * rate
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}  loss {loss.item():.3f}", flush=True)


def held_out_perplexity(model: LlamaForCausalLM, batch: Batch) -> float:
    """Perplexity over rows that training did not see, weighted as in training."""
    model.eval()
    with torch.no_grad():
        return math.exp(mean_loss(model, batch).item())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("nibble/demo/base"))
    parser.add_argument("--steps", type=int, default=6000)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    texts = prose_texts()
    rng = random.Random(0)
    talks = [turn_text(*turn) for _ in range(20_000) for turn in dialogue(rng)]
    tokenizer = train_tokenizer(texts + talks)
    prose: list[int] = []
    for text in texts:
        prose += [*tokenizer.encode(text, add_special_tokens=False), END_OF_TEXT]
    num_held_out = len(prose) // 20
    model = build_model()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(prose):,} tokens")
    fit(model, Rows(tokenizer, prose[num_held_out:], seed=1), arguments.steps)
    unseen = Rows(tokenizer, prose[:num_held_out], seed=2)
    for name, batch in (
        ("prose", unseen.prose_batch(64, LONG_ROW)),
        ("dialogues", unseen.dialogue_batch(64, LONG_ROW)),
    ):
        print(f"held-out perplexity of {name}: {held_out_perplexity(model, batch):.2f}")
    model.to(torch.bfloat16).save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
