"""What every benchmark says of the machine, and where its results go."""

import platform
import re
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch


def machine(device: str = "cpu") -> str:
    """The name of the device: of the GPU, or of the CPU where the system tells it."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def write_results(name: str, lines: Sequence[str], device: str = "cpu") -> None:
    """Write results/NAME_MACHINE_MONTH.md, with the command that made it below its title."""
    title, *rest = lines
    words = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    command = f"Command: `python benchmarks/{words}`"
    words_of_machine = re.findall(r"[a-z0-9]+", machine(device).lower().replace("(r)", ""))
    file_name = f"{name}_{'-'.join(words_of_machine)}_{date.today():%Y%m}.md"
    path = Path(__file__).parent / "results" / file_name
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join([title, "", command, *rest]) + "\n", encoding="utf-8")
