"""Predicted peak memory against that of the process, on a CPU.

    python benchmarks/plan_process.py [--write]

Random weights of a few shapes, random text, `nibble train` for three steps in a process of its own;
the peak is resident memory above what the process held before loading. The exit code is 1 where a
case of at least 500 MB is more than 10 % off.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

LIMIT = 0.10
# As runs do whose memory is short: without it the holes of the heap count, up to as much again.
DENSE = {"MALLOC_MMAP_THRESHOLD_": str(1 << 18)}
SMALLEST_MB = 500
SHAPES = {
    "llama-wide": {
        "model_type": "llama", "hidden_size": 1024, "intermediate_size": 2816,
        "num_hidden_layers": 8, "num_attention_heads": 16, "num_key_value_heads": 16,
    },
    "llama-deep": {
        "model_type": "llama", "hidden_size": 768, "intermediate_size": 2048,
        "num_hidden_layers": 24, "num_attention_heads": 12, "num_key_value_heads": 4,
    },
    "gemma2": {
        "model_type": "gemma2", "hidden_size": 768, "intermediate_size": 3072, "head_dim": 64,
        "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 6,
        "query_pre_attn_scalar": 64, "sliding_window": 4096,
    },
}  # fmt: skip
# shape, method, recompute, tokens in a row, rows in a pass
CASES = (
    ("llama-wide", "lora", "none", 1024, 1),
    ("llama-wide", "lora", "full", 1024, 2),
    ("llama-wide", "qlora", "none", 2048, 1),
    ("llama-wide", "qlora", "selective", 2048, 1),
    ("llama-wide", "full", "full", 512, 1),
    ("llama-deep", "lora", "selective", 1024, 1),
    ("llama-deep", "qlora", "none", 512, 2),
    ("gemma2", "lora", "none", 1024, 1),
)
VOCAB_SIZE = 16_000


def write_model(folder: Path, shape: dict) -> None:
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    values = {**shape, "vocab_size": VOCAB_SIZE, "max_position_embeddings": 4096}
    kind = transformers.models.auto.configuration_auto.CONFIG_MAPPING[values.pop("model_type")]
    config = kind(**values, bos_token_id=0, eos_token_id=1, tie_word_embeddings=False)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    words = {"<s>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, VOCAB_SIZE)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def write_text(path: Path) -> None:
    draw = random.Random(0)
    path.write_text(" ".join(f"w{draw.randrange(2, VOCAB_SIZE)}" for _ in range(40_000)))


def prepare(work: Path) -> None:
    """The models of `SHAPES` and a text, in a folder."""
    write_text(work / "text.txt")
    for shape, values in SHAPES.items():
        write_model(work / shape, values)


def measure(work: Path, case: tuple) -> dict:
    shape, method, recompute, length, size = case
    settings = [
        f"method={method}", f"train.recompute={recompute}", f"data.max_seq_len={length}",
        f"train.micro_batch_size={size}", f"train.batch_size={2 * size}", "train.steps=3",
        "data.format=text", "optim.paged=false", f"out={work / '-'.join(map(str, case))}",
        f"model.name={work / shape}", f"data.train={work / 'text.txt'}",
    ]  # fmt: skip
    words = [word for setting in settings for word in ("--set", setting)]
    environment = {
        **os.environ,
        **DENSE,
        "OMP_NUM_THREADS": "1",
        "XDG_CACHE_HOME": tempfile.mkdtemp(dir=work),
    }
    command = [sys.executable, "-m", "nibble", "train", *words]
    subprocess.run(
        command, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    events = (Path(settings[8].removeprefix("out=")) / "events.jsonl").read_text().splitlines()
    return json.loads(events[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="add the table to the results")
    arguments = parser.parse_args()
    lines = ["| shape | method | recompute | tokens | predicted MB | measured MB | off |"]
    lines += ["|---|---|---|---|---|---|---|"]
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        prepare(work)
        for case in CASES:
            end = measure(work, case)
            predicted = end["predicted_peak_memory_bytes"] / 1e6
            measured = end["peak_memory_bytes"] / 1e6
            off = predicted / measured - 1
            if measured >= SMALLEST_MB:
                worst = max(worst, abs(off))
            shape, method, recompute, length, size = case
            lines.append(
                f"| {shape} | {method} | {recompute} | {size} x {length} | {predicted:.0f} "
                f"| {measured:.0f} | {off:+.1%} |"
            )
            print(lines[-1], flush=True)
    print(f"worst {worst:.1%}, limit {LIMIT:.0%}")
    if arguments.write:
        write_results(lines)
    return 0 if worst <= LIMIT else 1


def write_results(lines: list[str]) -> None:
    import torch

    text = (
        "# Predicted peak memory against that of the process\n\n"
        f"torch {torch.__version__}, one thread. Command: `python benchmarks/plan_process.py "
        "--write`. Positive: predicted too much.\n\n" + "\n".join(lines) + "\n"
    )
    folder = Path(__file__).parent / "results"
    (folder / "plan_process_cpu_202611.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
