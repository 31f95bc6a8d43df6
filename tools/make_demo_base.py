"""Make the demo's base model: a tiny Llama, its tokenizer and chat template.

    python tools/make_demo_base.py [--out nibble/demo/base] [--seconds 660]

Trained from nothing, on one CPU thread, on two kinds of text:

1. prose that ships with Python: docstrings of the standard library, the help topics of
   pydoc, the licence, the Zen;
2. short dialogues that this script makes up: greetings, facts, looking things up, copying
   names and numbers. None of them is a letter to a shop, and none has the demo's answer
   format: what the demo teaches is not in here.

The second kind is what lets so small a model copy a number out of its context at all.
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
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from demo_dialogues import dialogue_text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
END_OF_TEXT, IM_END, PAD = 0, 2, 3
VOCAB_SIZE = 2048
ROW_TOKENS = 128
ROWS_PER_STEP = 16
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


class Rows:
    """Draws rows of ROW_TOKENS: pieces of prose, or dialogues laid end to end."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, prose: list[int], seed: int) -> None:
        self.encode = lambda text: tokenizer.encode(text, add_special_tokens=False)
        self.prose = prose
        self.rng = random.Random(seed)

    def prose_row(self) -> list[int]:
        start = self.rng.randrange(len(self.prose) - ROW_TOKENS)
        return self.prose[start : start + ROW_TOKENS]

    def dialogue_row(self) -> list[int]:
        row: list[int] = []
        while len(row) < ROW_TOKENS:
            row += [*self.encode(dialogue_text(self.rng)), END_OF_TEXT]
        return row[:ROW_TOKENS]

    def batch(self) -> torch.Tensor:
        num_prose = round(ROWS_PER_STEP * PROSE_SHARE)
        rows = [self.prose_row() for _ in range(num_prose)]
        rows += [self.dialogue_row() for _ in range(ROWS_PER_STEP - num_prose)]
        return torch.tensor(rows)


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


def mean_loss(model: LlamaForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next token over rows (B, S)."""
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def fit(model: LlamaForCausalLM, rows: Rows, seconds: float) -> int:
    """Train until the time is over; the learning rate follows the clock. Returns the steps."""
    matrices = [p for n, p in model.model.layers.named_parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    start, step, share = time.monotonic(), 0, 0.0
    while share < 1.0:
        rate = min(1.0, (step + 1) / 50) * min(1.0, (1 - share) / 0.5)
        loss = mean_loss(model, rows.batch())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * rate
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        if step % 50 == 0:
            print(f"step {step}  loss {loss.item():.3f}  {share:.0%}", flush=True)
        share = (time.monotonic() - start) / seconds
    return step


def held_out_perplexity(model: LlamaForCausalLM, rows: list[torch.Tensor]) -> float:
    """Perplexity per token over batches that training did not see."""
    model.eval()
    with torch.no_grad():
        losses = [mean_loss(model, batch).item() for batch in rows]
    model.train()
    return math.exp(sum(losses) / len(losses))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("nibble/demo/base"))
    parser.add_argument("--seconds", type=float, default=660)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    texts = prose_texts()
    rng = random.Random(0)
    tokenizer = train_tokenizer(texts + [dialogue_text(rng) for _ in range(20_000)])
    prose: list[int] = []
    for text in texts:
        prose += [*tokenizer.encode(text, add_special_tokens=False), END_OF_TEXT]
    num_held_out = len(prose) // 20
    model = build_model()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(prose):,} tokens")
    steps = fit(model, Rows(tokenizer, prose[num_held_out:], seed=1), arguments.seconds)
    unseen = Rows(tokenizer, prose[:num_held_out], seed=2)
    rows = [torch.tensor([unseen.prose_row() for _ in range(8)]) for _ in range(8)]
    talks = [torch.tensor([unseen.dialogue_row() for _ in range(8)]) for _ in range(8)]
    print(f"{steps} steps; held-out perplexity: prose {held_out_perplexity(model, rows):.2f}")
    print(f"dialogues {held_out_perplexity(model, talks):.2f}")
    model.to(torch.bfloat16).save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
