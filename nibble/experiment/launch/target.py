"""The kinds of places that run a job, and what each needs to be told."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from nibble.config import RunConfig
from nibble.disk import disk_errors, replace_file
from nibble.errors import DoesNotFitError, FolderInUseError, UsageError, did_you_mean
from nibble.experiment.launch import kubernetes, sky, slurm, ssh
from nibble.experiment.launch.job import Job, Options, check_options, make_job
from nibble.experiment.launch.script import MARK

_MOUNT = "/workspace"
_LONGEST_MARK = 200
# Of one machine: what clouds and clusters have.
_GPU_COUNTS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Target:
    """A kind of place.

    Args:
        render: The text of its file.
        suffix: Of the file.
        commands: What starts the job that stands in a file.
        needs: Options without which there is no job.
        takes: The others that have an effect.
        is_mounted: Whether nothing is kept but what is in the storage.
    """

    render: Callable[[Job], str]
    suffix: str
    commands: Callable[[str], list[list[str]]]
    needs: tuple[str, ...]
    takes: tuple[str, ...]
    is_mounted: bool = False


def _kubectl(file: str) -> list[list[str]]:
    """Foreground: a job is gone once its pods have saved and ended."""
    gone = ["kubectl", "delete", "--ignore-not-found", "--cascade=foreground", "-f", file]
    return [gone, ["kubectl", "apply", "-f", file]]


_ALL = ("gpus", "device", "workdir", "python")
TARGETS: Mapping[str, Target] = {
    "slurm": Target(
        slurm.render,
        ".sbatch",
        lambda file: [["sbatch", file]],
        needs=("memory", "cpus"),
        takes=(*_ALL, "nodes", "time"),
    ),
    "k8s": Target(
        kubernetes.render,
        ".yaml",
        _kubectl,
        needs=("memory", "image", "storage"),
        takes=(*_ALL, "nodes", "time", "cpus"),
        is_mounted=True,
    ),
    "sky": Target(
        sky.render,
        ".yaml",
        lambda file: [["sky", "jobs", "launch", file]],
        needs=("device", "image", "storage"),
        takes=(*_ALL, "nodes", "memory", "cpus"),
        is_mounted=True,
    ),
    "ssh": Target(
        ssh.render,
        ".sh",
        lambda file: [["bash", file]],
        needs=("hosts",),
        takes=(*_ALL, "port"),
    ),
}


@dataclass(frozen=True)
class Launch:
    """A file and the commands that start what stands in it, to be run in order."""

    file: Path
    commands: list[list[str]]


def target_of(name: str) -> Target:
    """The target of that name.

    Raises:
        UsageError: If there is none.
    """
    if name not in TARGETS:
        raise UsageError(
            f"--on {name!r} is none of {', '.join(TARGETS)}",
            fix=did_you_mean(name, TARGETS) or "choose one of them",
        )
    return TARGETS[name]


def write_launch(
    run: RunConfig, on: str, options: Options, *, to: Path | None = None, anyway: bool = False
) -> Launch:
    """Write the file of a job; nothing is started.

    Args:
        on: Name of a target.
        to: The file; None is named after the job, in this folder.

    Raises:
        UsageError: If the options, or the folder of the run, make no job.
        DoesNotFitError: If the number of GPUs is left to the plan and none is enough.
        FolderInUseError: If something else stands in the file.
        DiskError: If it cannot be written.
    """
    target = target_of(on)
    check_options(options, on, needs=target.needs, takes=target.takes)
    here = {"workdir": str(Path.cwd()), "python": sys.executable}
    job = make_job(
        run,
        options,
        gpus=options.gpus or _planned_gpus(run, options),
        defaults={"workdir": _MOUNT, "python": "python3"} if target.is_mounted else here,
        is_mounted=target.is_mounted,
        anyway=anyway,
    )
    text = target.render(job)
    file = to or Path(job.name + target.suffix)
    _write(file, text)
    # What begins with a dash would be an option.
    word = f"./{file}" if str(file).startswith("-") else str(file)
    return Launch(file, target.commands(word))


def _planned_gpus(run: RunConfig, options: Options) -> int:
    """The smallest number of GPUs on each machine that the plan lets the run start on.

    Raises:
        DoesNotFitError: If none does.
    """
    from nibble.plan.plan import make_plan

    plan, _ = make_plan(run, options.device)
    nodes = len(options.hosts) or options.nodes or 1
    for gpus in _GPU_COUNTS:
        if plan.fits or (run.train.shard and plan.fits_in_shards(gpus * nodes)):
            return gpus
    error = plan.error()
    raise DoesNotFitError(error.what, fix=error.fix.replace("try it --anyway", "give --gpus"))


def _write(file: Path, text: str) -> None:
    """Write a file, or replace one that was written here."""
    with disk_errors(f"cannot write {file}"):
        if file.is_dir():
            raise UsageError(f"--to {file} is a folder", fix="name a file in it")
        if file.exists() and not _is_ours(file):
            raise FolderInUseError(f"{file} holds something else", fix="give another --to")
        replace_file(file, text.encode())


def _is_ours(file: Path) -> bool:
    """Whether a file was written here; a pipe or a device never was."""
    if not file.is_file():
        return False
    with file.open("rb") as old:
        return MARK.encode() in old.read(_LONGEST_MARK)
