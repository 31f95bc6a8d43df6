"""Runs that their plan says fit, under a hard limit of what was planned.

    python benchmarks/plan_cap.py

Each case is trained for two steps in a process of its own whose private memory is limited, just
before loading, to what it holds plus the planned peak and the stated margin (RLIMIT_DATA). The exit
code is 1 where one of them runs out of memory.
"""

import json
import os
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

from plan_process import DENSE, prepare

MARGIN = 0.10
CASES = [
    *product(("llama-wide",), ("lora", "qlora"), ("none", "selective", "full", "offload"), (512,)),
    *product(("llama-wide",), ("lora", "qlora"), ("none", "full"), (1024,)),
    *product(("gemma2",), ("lora", "qlora"), ("none", "full"), (512,)),
    *product(("llama-deep",), ("qlora",), ("selective", "full"), (512,)),
    ("llama-wide", "full", "full", 256),
    ("llama-wide", "full", "none", 256),
]

CHILD = """
import json, resource, sys
import nibble, torch
from pathlib import Path
from nibble.plan.plan import concrete, make_plan
from nibble.train import trainer

settings, margin = json.loads(sys.argv[1]), float(sys.argv[2])
run = nibble.load_config(None, settings)
plan, dataset = make_plan(run)
status = Path("/proc/self/status").read_text().splitlines()
held = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
limit = held + round(plan.peak_memory_bytes * (1 + margin))
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
trainer.train(concrete(run, plan.settings), plan=plan.to_dict(), dataset=dataset)
print(plan.peak_memory_bytes)
"""


def main() -> int:
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        prepare(work)
        for number, (shape, method, recompute, length) in enumerate(CASES):
            settings = [
                f"method={method}", f"train.recompute={recompute}", f"data.max_seq_len={length}",
                "train.micro_batch_size=1", "train.batch_size=2", "train.steps=2",
                "data.format=text", "optim.paged=false", f"out={work / f'run{number}'}",
                f"model.name={work / shape}", f"data.train={work / 'text.txt'}",
            ]  # fmt: skip
            environment = {
                **os.environ, **DENSE, "OMP_NUM_THREADS": "1",
                "XDG_CACHE_HOME": tempfile.mkdtemp(dir=work),
            }  # fmt: skip
            done = subprocess.run(
                [sys.executable, "-c", CHILD, json.dumps(settings), str(MARGIN)],
                env=environment, capture_output=True, text=True,
            )  # fmt: skip
            failed += done.returncode != 0
            told = done.stdout.strip() if not done.returncode else done.stderr.strip()[-300:]
            print(f"{shape:11} {method:6} {recompute:10} {length:5} {told}", flush=True)
    print(f"{len(CASES) - failed} of {len(CASES)} ran in the planned memory and {MARGIN:.0%}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
