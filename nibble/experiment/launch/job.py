"""What a job runs and on which machines, checked before a file is written.

recipe, overrides -> RunConfig, and options of `nibble launch` -> Options -> Job
"""

import hashlib
import json
import posixpath
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields

import yaml

from nibble.config import RunConfig, interval_seconds
from nibble.errors import UsageError
from nibble.plan.devices import find_device, parse_memory
from nibble.train.folder import folder_of

PORT = 29500
_LIMITS = (("nodes", 1, 1024), ("gpus", 1, 64), ("cpus", 1, 4096), ("port", 1024, 65535))
# Folders that a machine has for itself, and may empty when it starts.
_OF_ONE_MACHINE = ("/tmp", "/var/tmp", "/dev/shm", "/run")
# What ssh takes as an option, or a shell would split, is no host; two colons make an address.
_NAME = r"[A-Za-z0-9_.][A-Za-z0-9_.-]*"
_HOST = re.compile(rf"({_NAME}@)?({_NAME}|(?=.*:.*:)[0-9A-Fa-f:.]+)")


@dataclass(frozen=True)
class Options:
    """What `nibble launch` was told of the machines; None or empty where it was not.

    Args:
        gpus: On each machine.
        cpus: Cores on each machine.
        memory: Of each machine's host, such as "64GiB".
        time: Of an attempt, or of the job.
        storage: What holds the folder of the run.
        hosts: Names to reach by ssh, the first of which the others reach too.
        workdir: Where relative paths start on the machines.
    """

    nodes: int | None = None
    gpus: int | None = None
    cpus: int | None = None
    device: str = ""
    memory: str = ""
    time: str = ""
    image: str = ""
    storage: str = ""
    hosts: tuple[str, ...] = ()
    workdir: str = ""
    python: str = ""
    port: int | None = None

    def given(self) -> dict[str, object]:
        """The options that were given."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value not in (None, "", ())}


@dataclass(frozen=True)
class Job:
    """A run on machines of one kind.

    Args:
        name: Of lower-case letters, digits and dashes, the same for the same folder of a run.
        words: The command on every machine.
        workdir: Absolute.
        stop_seconds: What the run takes at most to save and end.
        seconds: Time limit.
    """

    name: str
    words: tuple[str, ...]
    workdir: str
    nodes: int
    gpus: int
    stop_seconds: int
    cpus: int | None = None
    memory_bytes: int | None = None
    seconds: int | None = None
    device: str = ""
    image: str = ""
    storage: str = ""
    hosts: tuple[str, ...] = ()
    port: int = PORT


def check_options(
    options: Options, target: str, *, needs: Collection[str], takes: Collection[str]
) -> None:
    """Refuse options that a target lacks or has no use for, and values that make no sense.

    Raises:
        UsageError: It says which.
    """
    given = options.given()
    for name in given:
        if name not in {*needs, *takes}:
            raise UsageError(f"{_flag(name)} has no effect with --on {target}", fix="leave it out")
    for name in needs:
        if name not in given:
            raise UsageError(f"--on {target} needs {_flag(name)}", fix=f"give {_flag(name)}")
    for name, least, most in _LIMITS:
        value = given.get(name)
        if isinstance(value, int) and not least <= value <= most:
            raise UsageError(
                f"--{name} {value} is not from {least} to {most}", fix="give a number between them"
            )
    _check_device(options, target)
    _check_hosts(options.hosts)


def _check_hosts(hosts: Collection[str]) -> None:
    for host in hosts:
        if not _HOST.fullmatch(host):
            raise UsageError(
                f"--host {host!r} is no name of a host",
                fix="write gpu-0 or me@gpu-0; a port of ssh stands in its own settings",
            )
    if len({host.rpartition("@")[2] for host in hosts}) < len(hosts):
        raise UsageError("a --host stands twice", fix="name each machine once")


def _check_device(options: Options, target: str) -> None:
    if options.device:
        device = find_device(options.device)
        if device.type == "cpu" or device.count > 1:
            raise UsageError(
                f'--device "{options.device}" is not one GPU',
                fix="name the kind of GPU; --gpus and --nodes say how many",
            )
    elif options.gpus is None:
        raise UsageError(
            "--gpus is not set", fix="give it, or --device and the plan says how many it takes"
        )
    if options.device and options.gpus and target != "sky":
        raise UsageError(
            "--gpus and --device exclude each other: the plan for --device sets --gpus",
            fix="give one of them",
        )


def make_job(
    run: RunConfig,
    options: Options,
    *,
    gpus: int,
    defaults: Mapping[str, str],
    is_mounted: bool,
    anyway: bool = False,
) -> Job:
    """The job of a run.

    Args:
        options: Checked by `check_options`.
        defaults: Of `workdir` and `python`.
        is_mounted: Whether `workdir` is where the storage is, and all that is kept.
        anyway: Let the run start even if its plan says no.

    Raises:
        UsageError: If the folder of the run is none that the next attempt would find.
    """
    workdir = options.workdir or defaults["workdir"]
    if not workdir.startswith("/"):
        raise UsageError(f"--workdir {workdir} is not absolute", fix="begin it with /")
    nodes = len(options.hosts) or options.nodes or 1
    out = posixpath.normpath(posixpath.join(workdir, str(folder_of(run))))
    # A host has a disk of its own, and the first one is the first again.
    if not options.hosts:
        _check_shared(out, posixpath.normpath(workdir) if is_mounted else None)
    python = options.python or defaults["python"]
    for text in (workdir, python, options.image, options.storage):
        if yaml.reader.Reader.NON_PRINTABLE.search(text):
            raise UsageError(f"{text!r} has characters that no file can hold", fix="rename it")
    return Job(
        name=name_of(out, options.storage),
        words=(python, "-m", "nibble", *train_words(run, out, gpus, anyway=anyway)),
        workdir=workdir,
        nodes=nodes,
        gpus=gpus,
        stop_seconds=interval_seconds(run.train.stop_within, "train.stop_within"),
        cpus=options.cpus,
        memory_bytes=parse_memory(options.memory) if options.memory else None,
        seconds=interval_seconds(options.time, "--time") if options.time else None,
        device=options.device,
        image=options.image,
        storage=options.storage,
        hosts=options.hosts,
        port=options.port or PORT,
    )


def train_words(run: RunConfig, out: str, gpus: int, *, anyway: bool = False) -> list[str]:
    """The words after `nibble` that train this run in `out`, whatever becomes of its recipe."""
    flat = {**run.flat(), "out": out}
    given = [key for key in flat if key == "out" or run.origin(key) != "default"]
    settings = [f"{key}={json.dumps(flat[key])}" for key in given]
    words = [word for setting in settings for word in ("--set", setting)]
    return ["train", *words, *(["--anyway"] if anyway else []), "--devices", str(gpus)]


def name_of(out: str, storage: str = "") -> str:
    """A name that every kind of place takes, of at most 48 characters.

    >>> name_of("/data/runs/First try")
    'nibble-first-try-2aa08006'
    """
    text = re.sub(r"[^a-z0-9]+", "-", posixpath.basename(out).lower())[:30].strip("-")
    digest = hashlib.sha256(f"{storage}\0{out}".encode(errors="surrogatepass")).hexdigest()[:8]
    return "-".join(part for part in ("nibble", text, digest) if part)


def _check_shared(out: str, mount: str | None) -> None:
    """Refuse a folder that is gone with the machine of an attempt."""
    if mount is not None and not _is_in(out, mount):
        raise UsageError(
            f"out: {out} is outside of the storage at {mount}: another attempt would not find it",
            fix="leave out relative, or give a folder in --workdir",
        )
    if mount is None and any(_is_in(out, folder) for folder in _OF_ONE_MACHINE):
        raise UsageError(
            f"out: {out} is on the disk of one machine: another attempt may run elsewhere",
            fix="give --out a folder that all machines share",
        )


def _is_in(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip("/") + "/")


def _flag(name: str) -> str:
    return "--host" if name == "hosts" else f"--{name}"
