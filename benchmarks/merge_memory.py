"""Does a merge need no more host memory than four times the largest tensor and 300 MB?

    python benchmarks/merge_memory.py [--gigabytes 2] [--kind llama|mixtral]

Writes a synthetic bf16 checkpoint and an adapter of all its layers, merges onto each target in a
fresh process, and compares the peak of its resident memory, file pages and imports included, with
the bound; the exit code is 1 when it is above.
"""

import argparse
import json
import subprocess
import sys
import tempfile

from load_memory import MB, PROJECT, write_checkpoint, write_tokenizer

ALLOWANCE_BYTES = 300 * MB
TARGETS = ("16bit", "dequantized", "4bit", "4bit-search")

CHILD = """
import json, time
from pathlib import Path
from nibble.adapter.merge import Merge, base_options_of, merge

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

adapter = Path({adapter!r})
options = base_options_of(adapter, {{}}, {{}})
imports = status("VmRSS")
started = time.perf_counter()
merge(Merge(adapter, {folder!r}, None, options), Path({out!r}), {onto!r})
print(json.dumps(dict(peak=status("VmHWM"), imports=imports,
                      seconds=time.perf_counter() - started)))
"""


def write_adapter(folder: str, out: str) -> None:
    """An adapter of rank 16 on all layers with random factors."""
    import torch

    from nibble.adapter.format import write_adapter as write
    from nibble.model.adapt import adapt
    from nibble.model.load import load_base

    model, tokenizer = load_base(folder, storage="nf4")
    generator = torch.Generator().manual_seed(0)
    adapt(model, rank=16, generator=generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.02, generator=generator)
    write(model, out, tokenizer=tokenizer)


def main() -> None:
    """Measure each target once, print a line each, and judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--kind", choices=("llama", "mixtral"), default="llama")
    chosen = parser.parse_args()
    worst = 0.0
    with tempfile.TemporaryDirectory() as place:
        folder, adapter = f"{place}/base", f"{place}/adapter"
        largest = write_checkpoint(folder, kind=chosen.kind, gigabytes=chosen.gigabytes)
        write_tokenizer(folder)
        write_adapter(folder, adapter)
        bound = 4 * largest + ALLOWANCE_BYTES
        for onto in TARGETS:
            code = CHILD.format(adapter=adapter, folder=folder, out=f"{place}/out", onto=onto)
            done = subprocess.run(
                [sys.executable, "-c", code],
                check=True,
                capture_output=True,
                text=True,
                cwd=PROJECT,
            )
            found = json.loads(done.stdout.splitlines()[-1])
            subprocess.run(["rm", "-r", f"{place}/out"], check=True)
            worst = max(worst, found["peak"] / bound)
            peak, imports, most = (n / MB for n in (found["peak"], found["imports"], bound))
            print(
                f"{onto:12} peak {peak:,.0f} MB (imports {imports:,.0f}), bound {most:,.0f} MB, "
                f"{found['seconds']:.1f} s",
                flush=True,
            )
    sys.exit(worst > 1)


if __name__ == "__main__":
    main()
