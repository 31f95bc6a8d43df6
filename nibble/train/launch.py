"""Several processes for one run: which of them this is, and how they are started.

    nibble train ... --devices 2
    python -m torch.distributed.run --nproc-per-node 2 ... -m nibble train ...

The first does the second, prints it, and hands on the exit code of the rank that ended first. For
several machines torchrun's own settings count (PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR and
PET_MASTER_PORT), so that the same command is given on each. torch is imported only to start them.
"""

import logging
import os
import shlex
import signal
import socket
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import psutil

from nibble.errors import RunInterrupted, StoppedError, UnavailableError, UsageError

_NODES = "PET_NNODES"
_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1")
# Ranks end by themselves within the time they are given and 30 s; torchrun kills them then.
_SPARE_SECONDS = 35
_LOOPBACK = "lo"
_ATTEMPT = "TORCHELASTIC_RESTART_COUNT"


@dataclass(frozen=True)
class Place:
    """Where a process stands among those of its run.

    Args:
        local_rank: Its number on this machine: which device it takes.
        address: Of the machine where they meet.
        is_server: Whether this process has to open the port there: torchrun does it itself.
        attempt: How often the run was restarted by torchrun.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    address: str = ""
    port: int = 0
    is_server: bool = False
    attempt: int = 0


def place_here(environment: Mapping[str, str] = os.environ) -> Place:
    """The place that the environment names; without WORLD_SIZE the process is alone.

    Raises:
        UsageError: If a part of it is missing or makes no sense.
    """
    if environment.get("WORLD_SIZE", "1") == "1":
        return Place()
    rank, world_size = (_number(environment, name) for name in ("RANK", "WORLD_SIZE"))
    if rank >= world_size:
        raise UsageError(f"RANK={rank} is not below WORLD_SIZE={world_size}", fix="use torchrun")
    address = environment.get("MASTER_ADDR", "")
    if not address:
        raise UsageError("WORLD_SIZE is set and MASTER_ADDR is not", fix="use torchrun")
    has_agent = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Place(
        rank=rank,
        world_size=world_size,
        local_rank=_number(environment, "LOCAL_RANK"),
        address=address,
        port=_number(environment, "MASTER_PORT"),
        is_server=rank == 0 and not has_agent,
        attempt=_number({_ATTEMPT: "0", **environment}, _ATTEMPT),
    )


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    if not (text.isascii() and text.isdigit()):
        raise UsageError(
            f"{name} is {text!r} in the environment, expected a number",
            fix="start the run with torchrun or --devices, or unset WORLD_SIZE",
        )
    return int(text)


def is_launcher(devices: int) -> bool:
    """Whether this process is to start others: it is asked to, and is none of them itself."""
    has_more = devices > 1 or _NODES in os.environ
    return has_more and "WORLD_SIZE" not in os.environ


def torchrun_arguments(devices: int, words: Sequence[str]) -> list[str]:
    """What torchrun is given to run `nibble` with these words; one machine has a port of its own.

    Its static way to meet is taken: the other unpickles what comes from the network.
    """
    place = ["--rdzv-backend", "static"]
    if _NODES not in os.environ:
        place = ["--nnodes", "1", "--node-rank", "0", "--master-addr", "127.0.0.1"]
        place += ["--master-port", str(_free_port())]
    return ["--nproc-per-node", str(devices), *place, "-m", "nibble", *words]


def launch(devices: int, words: Sequence[str], *, stop_seconds: int) -> int:
    """Run `nibble` with these words in so many processes; the exit code of them all.

    Args:
        stop_seconds: What a rank takes at most to save and end.

    Raises:
        UnavailableError: If this machine has fewer devices.
    """
    import torch
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    count = torch.cuda.device_count()
    if torch.cuda.is_available() and devices > count:
        raise UnavailableError(
            f"--devices {devices}: this machine has {count}",
            fix=f"give --devices {count} at most",
        )
    arguments = torchrun_arguments(devices, words)
    command = [sys.executable, "-m", "torch.distributed.run", *arguments]
    print(shlex.join(command), file=sys.stderr, flush=True)  # noqa: T201
    _set_environment(devices, stop_seconds, is_one_machine=_NODES not in os.environ)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run(parse_args(arguments))
    except ChildFailedError as error:
        return exit_code_of(failure.exitcode for failure in error.failures.values())
    except SignalException as error:
        _wait_for_ranks(stop_seconds)
        is_interrupt = error.sigval == signal.SIGINT
        return (RunInterrupted if is_interrupt else StoppedError).exit_code
    return 0


def exit_code_of(codes: Iterable[int]) -> int:
    """One exit code for ranks that failed: a reason of their own before that of being left alone.

    A rank that was killed leaves a run that can be continued.
    """
    found = [StoppedError.exit_code if code < 0 else code for code in codes]
    return next((code for code in found if code != StoppedError.exit_code), StoppedError.exit_code)


def _wait_for_ranks(stop_seconds: int) -> None:
    """A third signal has torchrun leave ranks that are at work on their last checkpoint."""
    for name in _SIGNALS:
        signal.signal(signal.Signals[name], signal.SIG_IGN)
    _, late = psutil.wait_procs(psutil.Process().children(), stop_seconds + _SPARE_SECONDS)
    for rank in late:
        rank.kill()


def _set_environment(devices: int, stop_seconds: int, *, is_one_machine: bool) -> None:
    """Share the cores, keep to this machine where there is one, and hand every signal on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (cores or 1) // devices)))
    # Of connections that end because a process did, which nibble says better.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    is_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    heeded = (name for name in _SIGNALS if not (is_nohup and name == "SIGHUP"))
    os.environ["PET_SIGNALS_TO_HANDLE"] = ",".join(heeded)
    os.environ.setdefault("PET_SHUTDOWN_TIMEOUT", str(stop_seconds + _SPARE_SECONDS))
    has_loopback = any(name == _LOOPBACK for _, name in socket.if_nameindex())
    if is_one_machine and has_loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _LOOPBACK)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
