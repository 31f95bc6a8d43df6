"""`nibble serve`: 32 requests for four adapters at once, against the same one at a time.

    OMP_NUM_THREADS=1 python benchmarks/serve_throughput.py [--model DIR] [--method qlora] [--write]

Greedy answers over HTTP, from a server in a process of its own. Both ways are run in turn; every
answer must be the same text both ways.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from recording import machine, write_results

from nibble.adapter.format import write_adapter
from nibble.model.adapt import adapt
from nibble.model.load import load_base

NUM_REQUESTS = 32
NUM_ADAPTERS = 4
NUM_TOKENS = 32
WORDS = ("red", "blue", "green", "one", "two", "three", "sun", "moon")
SHARED = Path(__file__).resolve().parents[2] / "shared"


def make_adapters(model: str, folder: Path) -> list[str]:
    """Adapters that change the answers, written from seeds."""
    names = [f"adapter-{number}" for number in range(NUM_ADAPTERS)]
    for number, name in enumerate(names):
        base, _ = load_base(model, "bf16")
        adapt(base, rank=16, alpha=32)
        torch.manual_seed(number)
        with torch.no_grad():
            for parameter_name, parameter in base.named_parameters():
                if parameter_name.endswith("lora_B"):
                    parameter.normal_(std=0.02)
        write_adapter(base, folder / name)
    return names


class Server:
    """`nibble serve` in a process of its own."""

    def __init__(self, model: str, method: str, folder: Path, names: list[str]) -> None:
        adapters = [word for name in names for word in ("--adapter", f"{name}={folder / name}")]
        command = [sys.executable, "-m", "nibble", "serve", "--model", model, "--port", "0"]
        command += ["--token", "none", "--method", method, *adapters]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        if self.process.stderr is None:
            raise SystemExit("the server has no output")
        self.address = ""
        while not self.address:
            line = self.process.stderr.readline()
            if not line:
                raise SystemExit("the server did not start")
            if line.startswith("address"):
                self.address = line.split()[1]
        time.sleep(2)

    def answer(self, request: tuple[str, str]) -> tuple[str, int]:
        """Text and number of new tokens."""
        name, prompt = request
        body = {"model": name, "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0}
        call = urllib.request.Request(
            f"{self.address}/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(call) as response:
            found = json.load(response)
        return found["choices"][0]["text"], found["usage"]["completion_tokens"]


def measure(server: Server, names: list[str], rounds: int) -> tuple[list[float], list[float], bool]:
    """Tokens a second one at a time, and at once, by round; and whether all answers were equal."""
    requests = [
        (names[n % NUM_ADAPTERS], f"{WORDS[n % 8]} {WORDS[n * 5 % 8]} {n} and")
        for n in range(NUM_REQUESTS)
    ]
    server.answer(requests[0])
    rates: tuple[list[float], list[float]] = ([], [])
    expected, is_equal = None, True
    with ThreadPoolExecutor(NUM_REQUESTS) as pool:
        for _ in range(rounds):
            for kind, run in enumerate((map, pool.map)):
                begun = time.perf_counter()
                answers = list(run(server.answer, requests))
                seconds = time.perf_counter() - begun
                print(f"{seconds:.1f} s", file=sys.stderr)
                rates[kind].append(sum(count for _, count in answers) / seconds)
                expected = expected or answers
                is_equal &= answers == expected
    return *rates, is_equal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(SHARED / "models" / "base-16m"))
    parser.add_argument("--method", default="lora", choices=("lora", "qlora"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="also write benchmarks/results/")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        names = make_adapters(options.model, Path(folder))
        server = Server(options.model, options.method, Path(folder), names)
        try:
            alone, together, is_equal = measure(server, names, options.rounds)
        finally:
            server.process.terminate()
            server.process.wait()
    ratio = statistics.median(b / a for a, b in zip(alone, together, strict=True))
    lines = [
        "# Answers of `nibble serve` at once against one at a time",
        "",
        f"Device: {machine()}, {torch.get_num_threads()} thread(s). torch {torch.__version__}. "
        f"{Path(options.model).name}, {options.method}; {NUM_REQUESTS} requests for "
        f"{NUM_ADAPTERS} adapters of rank 16, up to {NUM_TOKENS} new tokens each, greedy. "
        f"Median of {options.rounds} interleaved rounds.",
        "",
        "| requests | tokens/s | rounds |",
        "|---|---|---|",
        *(
            f"| {title} | {statistics.median(rates):,.0f} | "
            f"{', '.join(f'{rate:,.0f}' for rate in rates)} |"
            for title, rates in (("one at a time", alone), ("32 at once", together))
        ),
        "",
        f"At once: {ratio:.2f} times as many. Same answers: {'yes' if is_equal else 'NO'}.",
    ]
    print("\n".join(lines))
    if options.write:
        write_results(f"serve_throughput_{options.method}", lines)


if __name__ == "__main__":
    main()
