"""The CUDA devices of this machine, asked in a process of its own.

Asking for the free memory of a card takes half a GiB of it, which this gives back.
"""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass

from nibble.errors import UnavailableError


@dataclass(frozen=True)
class Card:
    """A CUDA device: its name, compute capability, memory, and what of that is free."""

    name: str
    capability: str
    total_bytes: int
    free_bytes: int


def read_cards() -> list[Card]:
    """The CUDA devices that this process may use; none where there is no CUDA.

    Raises:
        UnavailableError: If CUDA is there and does not answer.
    """
    import torch

    if not torch.cuda.is_available():
        return []
    command = [sys.executable, "-m", "nibble.experiment.cards"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise UnavailableError(f"the GPUs cannot be asked: {last}", fix="`nibble doctor` says more")
    return [Card(**values) for values in json.loads(done.stdout.splitlines()[-1])]


def _ask() -> list[Card]:
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        free, total = torch.cuda.mem_get_info(index)
        found.append(Card(torch.cuda.get_device_name(index), f"{major}.{minor}", total, free))
    return found


if __name__ == "__main__":
    print(json.dumps([asdict(card) for card in _ask()]))  # noqa: T201
