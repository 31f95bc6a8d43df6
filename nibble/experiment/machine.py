"""This machine as an engine of a sweep: its devices, and runs as processes on them.

A process outlives the sweep that started it, if that is killed. It goes on then, and the next sweep
takes it over where it is: no run is done twice.
"""

import os
import signal
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from nibble.config import RunConfig
from nibble.errors import StoppedError
from nibble.experiment import engine
from nibble.experiment.cards import read_cards
from nibble.experiment.engine import Ended, Started
from nibble.experiment.placement import Place
from nibble.experiment.record import Planned
from nibble.plan.devices import Device, card, find_device
from nibble.train import folder

# What a process says of itself: the place it was put on.
PLACE_VARIABLE = "NIBBLE_PLACE"
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_THREADS = "OMP_NUM_THREADS"


@dataclass(frozen=True)
class Found:
    """A run at work that another sweep has started."""

    process: psutil.Process
    out: Path


Handle = Started | Found


@dataclass
class Machine:
    """This machine's processes.

    Args:
        find_places: What runs can be put on, with the memory that is free of it now.
        train: What runs a config file; nothing stands for `nibble train`.
    """

    find_places: Callable[[], Sequence[Place]]
    train: Sequence[str] = ()
    _known: Sequence[Place] = ()

    def places(self, *, is_idle: bool) -> Sequence[Place]:
        """What runs can be put on; looked at anew while none of them takes memory."""
        if is_idle or not self._known:
            self._known = self.find_places()
        return self._known

    def start(self, planned: Planned, out: Path, *, at: Place) -> Handle:
        """Start a run, or continue what stands in its folder."""
        return self.start_named(planned.run, out, planned.trial.name, at=at)

    def start_named(self, run: RunConfig, out: Path, name: str, *, at: Place) -> Handle:
        """The same for a run that is not of a plan's making."""
        environment = {**at.environment, PLACE_VARIABLE: at.name}
        return engine.start(run, out, name, environment=environment, train=self.train)

    def at_work(self, out: Path, names: Collection[str]) -> dict[str, tuple[Handle, str]]:
        """The runs of a sweep that go on already, by name, each with its place."""
        configs = {(out / f"{name}.yaml").resolve(): name for name in names}
        found: dict[str, tuple[Handle, str]] = {}
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                words = process.cmdline()
                if words[-2:-1] != ["train"] or process.status() == psutil.STATUS_ZOMBIE:
                    continue
                name = configs.get(Path(process.cwd(), words[-1]).resolve())
                if name is not None:
                    found[name] = (Found(process, out / name), self._place_of(process.environ()))
        return found

    def _place_of(self, environment: Mapping[str, str]) -> str:
        """Where a process is: where a sweep has put it, else on the first device that it sees."""
        if environment.get(PLACE_VARIABLE):
            return environment[PLACE_VARIABLE]
        first = environment.get(_VISIBLE, "").partition(",")[0]
        places = self.places(is_idle=False)
        seen = [place for place in places if first and place.environment.get(_VISIBLE) == first]
        return next((place.name for place in [*seen, *places]), "")

    def ended(self, handle: Handle) -> Ended | None:
        """How a run ended; None while it is at work."""
        if isinstance(handle, Started):
            return engine.ended(handle)
        with suppress(psutil.NoSuchProcess):
            is_alive = handle.process.is_running()
            if is_alive and handle.process.status() != psutil.STATUS_ZOMBIE:
                return None
        # Nobody knows its exit code: if it is not finished, it is started again and says it.
        is_finished = folder.is_finished(handle.out)
        code = 0 if is_finished else StoppedError.exit_code
        return Ended(code, "" if is_finished else "ended unseen", 0.0)

    def stop(self, handles: Sequence[Handle]) -> None:
        """Let all of them finish their step, save and end."""
        for handle in handles:
            with suppress(ProcessLookupError, psutil.NoSuchProcess):
                handle.process.send_signal(signal.SIGTERM)
        for handle in handles:
            handle.process.wait()


def this_machine(workers: int | None) -> tuple[Machine, Device]:
    """This machine, and the device that runs are planned for: its largest card, or its CPU.

    Args:
        workers: Runs at a time on a device; None is one on a CPU, and on a GPU as many as fit.

    Raises:
        UnavailableError: If the GPUs cannot be asked.
    """
    cards = read_cards()
    if not cards:
        device = find_device("cpu")
        return Machine(lambda: [_cpu_place(workers or 1)]), device
    largest = max(cards, key=lambda one: one.free_bytes)
    device = card(largest.name, largest.total_bytes, largest.capability)
    device = replace(device, memory_bytes=largest.free_bytes)
    return Machine(lambda: _card_places(workers)), device


def _cpu_place(workers: int) -> Place:
    import torch

    from nibble.train.memory import available_bytes

    threads = max(1, (os.cpu_count() or 1) // workers)
    is_shared = workers > 1 and _THREADS not in os.environ
    return Place(
        "CPU",
        available_bytes(torch.device("cpu")),
        most_runs=workers,
        environment={_THREADS: str(threads)} if is_shared else {},
    )


def _card_places(workers: int | None) -> list[Place]:
    import torch

    from nibble.train.memory import available_bytes

    visible = [name for name in os.environ.get(_VISIBLE, "").split(",") if name]
    host_bytes = available_bytes(torch.device("cpu"))
    return [
        Place(
            f"cuda:{index}",
            one.free_bytes,
            most_runs=workers,
            host_bytes=host_bytes,
            environment={_VISIBLE: visible[index] if visible else str(index)},
        )
        for index, one in enumerate(read_cards())
    ]
