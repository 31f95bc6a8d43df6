"""Does loading in 4 bits need no more host memory than the result and one tensor?

    python benchmarks/load_memory.py [--gigabytes 1] [--storage nf4] [--kind llama|mixtral]

Writes a synthetic bf16 checkpoint, loads it in a fresh process, and compares the peak of its
resident memory (file pages included, what the imports take left out) with result + 1.1 x largest
tensor of the checkpoint + 200 MB; the exit code is 1 when it is above. Experts are stored one by
one.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MB = 1_000_000
PROJECT = Path(__file__).resolve().parents[1]
ALLOWANCE_BYTES = 200 * MB

CHILD = """
import json, time
from pathlib import Path
import torch
from nibble.kernels.nf4 import implementation, quantize
from nibble.model.ledger import resident_bytes
from nibble.model.load import load_base

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

quantize(torch.ones(64))
imports = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
started = time.perf_counter()
model, _ = load_base({folder!r}, storage={storage!r})
seconds = time.perf_counter() - started
print(json.dumps(dict(
    result=sum(resident_bytes(model).values()), peak=status("VmHWM") - imports,
    after=status("VmRSS") - imports, imports=imports, seconds=seconds, code=implementation())))
"""


def write_checkpoint(folder: str, *, kind: str, gigabytes: float) -> int:
    """A bf16 checkpoint of about this size in shards of 300 MB; the largest tensor in bytes."""
    import torch
    import transformers

    sizes = {"vocab_size": 32_000, "hidden_size": 2048, "num_attention_heads": 16}
    sizes |= {"num_key_value_heads": 4, "intermediate_size": 5632, "num_hidden_layers": 1}
    kinds = {
        "llama": (transformers.LlamaConfig, {}),
        "mixtral": (
            transformers.MixtralConfig,
            {"num_local_experts": 8, "intermediate_size": 1408},
        ),
    }
    make, extra = kinds[kind]
    count = 1
    with torch.device("meta"):
        per_layer = _bytes(make(**(sizes | extra | {"num_hidden_layers": 2})))
        per_layer -= _bytes(make(**(sizes | extra)))
        rest = _bytes(make(**(sizes | extra))) - per_layer
    count = max(1, round((gigabytes * 1e9 - rest) / per_layer))
    config = make(**(sizes | extra | {"num_hidden_layers": count}))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="300MB")
    return max(p[0].nbytes if p.ndim == 3 else p.nbytes for p in model.parameters())


def _bytes(config: Any) -> int:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return sum(parameter.nbytes for parameter in model.parameters())


def write_tokenizer(folder: str) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--storage", default="nf4")
    parser.add_argument("--kind", default="llama", choices=["llama", "mixtral"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        largest = write_checkpoint(folder, kind=args.kind, gigabytes=args.gigabytes)
        write_tokenizer(folder)
        on_disk = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        code = CHILD.format(folder=folder, storage=args.storage)
        run = subprocess.run(
            [sys.executable, "-c", code], cwd=PROJECT, stdout=subprocess.PIPE, check=True
        )
    report = json.loads(run.stdout)
    limit = report["result"] + 1.1 * largest + ALLOWANCE_BYTES
    report |= {"checkpoint": on_disk, "largest": largest, "limit": limit}
    for name in ("checkpoint", "largest", "result", "peak", "after", "limit", "imports"):
        print(f"{name:>12} {report[name] / MB:9.1f} MB")
    print(f"{'seconds':>12} {report['seconds']:9.1f}    ({report['code']})")
    is_within = report["peak"] <= limit
    print("within the limit" if is_within else "ABOVE THE LIMIT")
    return 0 if is_within else 1


if __name__ == "__main__":
    sys.exit(main())
