"""Write launch/: the file that `nibble launch` writes for each kind of place, one machine and two.

    python tests/golden/make_launch.py

Read the files before committing a change: they are the expected truth of
tests/experiment/launch/test_target.py.
"""

from pathlib import Path

from nibble.config import load_config
from nibble.experiment.launch.job import Options
from nibble.experiment.launch.target import TARGETS, write_launch

FOLDER = Path(__file__).resolve().parent / "launch"
SETTINGS = (
    "model.name=models/base", 'data.train="rows of $(hostname) and \'others\'.jsonl"',
    "out=runs/first", "optim.lr=1e-4",
)  # fmt: skip
_PODS = {"image": "registry.example/nibble:1", "memory": "64GiB", "gpus": 8}
_HOST = {"workdir": "/shared/my work", "python": "/shared/venv/bin/python"}
_SLURM = {**_HOST, "memory": "256GiB", "cpus": 64, "gpus": 8}
CASES = {
    "slurm-one": _SLURM,
    "slurm-two": {**_SLURM, "nodes": 2, "time": "8h"},
    "k8s-one": {**_PODS, "storage": "claim"},
    "k8s-two": {**_PODS, "storage": "claim", "nodes": 2, "time": "2h", "cpus": 32},
    "sky-one": {**_PODS, "storage": "volume", "device": "H100"},
    "sky-two": {**_PODS, "storage": "s3://bucket", "device": "A100-80GB", "nodes": 2, "cpus": 32},
    "ssh-one": {**_HOST, "hosts": ("gpu-0",), "gpus": 8},
    "ssh-two": {**_HOST, "hosts": ("me@gpu-0", "gpu-1"), "gpus": 8, "port": 29501},
}


def write(case, folder):
    """Write the file of a case into a folder, and give its path."""
    target = case.partition("-")[0]
    file = folder / f"{case}{TARGETS[target].suffix}"
    write_launch(load_config(None, SETTINGS), target, Options(**CASES[case]), to=file)
    return file


if __name__ == "__main__":
    for case in CASES:
        print(write(case, FOLDER))
