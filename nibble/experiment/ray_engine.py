"""A Ray cluster as the engine of a sweep: the folder of the sweep is shared by its machines.

    RAY_ADDRESS=HOST:PORT nibble sweep ... --on ray     a cluster that is there
    nibble sweep ... --on ray                           the one of this machine, started if need be

Who reaches the ports of a Ray cluster without authentication runs code on it: it is connected to
with a token only (RAY_AUTH_TOKEN or ~/.ray/auth_token), and started without its dashboard.

Each run is a task on the node where its plan fits, with CPUs, memory and its share of a GPU as
resources of Ray. A run that loses its node goes on elsewhere, from its checkpoint.
"""

# pyright: reportMissingImports=false
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nibble.config import RunConfig
from nibble.errors import StoppedError, UnavailableError, UsageError
from nibble.experiment.cards import Card, read_cards
from nibble.experiment.engine import Ended
from nibble.experiment.machine import Machine
from nibble.experiment.placement import Place
from nibble.experiment.record import Planned
from nibble.plan.devices import Device, card, find_device

_AUTH_MODE = "RAY_AUTH_MODE"
_POLL_SECONDS = 0.2
# A task that was asked to stop and has not even begun by then is taken back.
_STOP_SECONDS = 60.0
_DESCRIBE_SECONDS = 120.0
# Ray counts a device in parts of so many.
_PARTS = 10_000


@dataclass(frozen=True)
class Task:
    """A run on the cluster: what will be its end, and the file that asks it to stop."""

    end: Any
    stop_file: Path


@dataclass(frozen=True)
class Node:
    """A machine of the cluster: its name and number, CPUs, memory for tasks, and cards."""

    name: str
    node_id: str
    num_cpus: int
    memory_bytes: int
    cards: Sequence[Card] = ()


@dataclass
class Cluster:
    """The machines of a Ray cluster that this process is connected to.

    Args:
        workers: Runs at a time on a device; None is one on a CPU, and on a GPU as many as fit.
        train: What runs a config file; nothing stands for `nibble train`.
    """

    workers: int | None
    train: Sequence[str] = ()
    _nodes: dict[str, Node] = field(default_factory=dict)

    def nodes(self) -> list[Node]:
        """The machines that are there now."""
        import ray

        alive = [values for values in ray.nodes() if values["Alive"]]
        for values in alive:
            if values["NodeID"] not in self._nodes:
                self._nodes[values["NodeID"]] = _node(values)
        return [self._nodes[values["NodeID"]] for values in alive]

    def places(self, *, is_idle: bool) -> Sequence[Place]:
        """Every card; where there is none in the whole cluster, every machine."""
        nodes = self.nodes()
        cards = [(node, n, one) for node in nodes for n, one in enumerate(node.cards)]
        if not cards:
            most = self.workers or 1
            return [
                Place(node.name, node.memory_bytes, most_runs=min(most, node.num_cpus))
                for node in nodes
                if node.num_cpus
            ]
        return [
            Place(
                f"{node.name} cuda:{number}",
                one.free_bytes,
                most_runs=self.workers,
                host=node.name,
                host_bytes=node.memory_bytes,
            )
            for node, number, one in cards
        ]

    def start(self, planned: Planned, out: Path, *, at: Place) -> Task:
        """Start a run, or continue what stands in its folder."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        name = planned.trial.name
        node = next(node for node in self.nodes() if node.name == (at.host or at.name))
        task = Task(None, out / f".{name}.stop")
        task.stop_file.unlink(missing_ok=True)
        remote: Any = ray.remote
        end = (
            remote(_train_there)
            .options(
                name=name,
                max_retries=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False),
                **resources(planned, at, node),
            )
            .remote(
                planned.run.model_dump(),
                (str(out), name, at.name),
                environment=at.environment,
                train=list(self.train),
                folder=str(Path.cwd()),
            )
        )
        return replace(task, end=end)

    def at_work(self, out: Path, names: Collection[str]) -> Mapping[str, tuple[Any, str]]:
        """Nothing is known of them here: a task that finds its run at work waits for it."""
        return {}

    def ended(self, handle: Task) -> Ended | None:
        """How a run ended; None while it is at work. One that lost its node can go on."""
        import ray
        from ray.exceptions import RayError

        ready, _ = ray.wait([handle.end], timeout=0)
        if not ready:
            return None
        try:
            return Ended(*ray.get(handle.end))
        except RayError as error:
            first = str(error).strip().splitlines()[0]
            return Ended(StoppedError.exit_code, f"lost its node: {first}", 0.0)

    def stop(self, handles: Sequence[Task]) -> None:
        """Let runs finish their step, save and end."""
        import ray

        if not handles:
            return
        for handle in handles:
            handle.stop_file.touch()
        ends = [handle.end for handle in handles]
        _, others = ray.wait(ends, num_returns=len(ends), timeout=_STOP_SECONDS)
        for end in others:
            ray.cancel(end)
        for handle in handles:
            handle.stop_file.unlink(missing_ok=True)


@contextmanager
def connected(
    workers: int | None,
) -> Iterator[tuple[Cluster, Device]]:
    """The cluster, and the device that runs are planned for: its largest card or machine.

    Args:
        workers: Runs at a time on a device; None is one on a CPU, and on a GPU as many as fit.

    Raises:
        UnavailableError: If ray is not installed, or the cluster cannot be reached.
        UsageError: If the environment turns authentication off.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if os.environ.setdefault(_AUTH_MODE, "token") != "token":
        raise UsageError(
            f"{_AUTH_MODE} is {os.environ[_AUTH_MODE]!r}: whoever reaches such a cluster runs code "
            "on it",
            fix=f"set {_AUTH_MODE}=token for the cluster and here",
        )
    try:
        import ray
        from ray.exceptions import RayError
    except ImportError:
        raise UnavailableError("--on ray needs ray", fix='pip install "nibble[ray]"') from None
    with _own_signals():
        try:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        except (RayError, ConnectionError, RuntimeError, ValueError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UnavailableError(
                f"the Ray cluster cannot be reached: {first}",
                fix="check RAY_ADDRESS, and that RAY_AUTH_TOKEN or ~/.ray/auth_token is its token",
            ) from None
    try:
        cluster = Cluster(workers)
        yield cluster, _device(cluster.nodes())
    finally:
        ray.shutdown()


def resources(planned: Planned, at: Place, node: Node) -> dict[str, Any]:
    """What a run takes, in Ray's terms: CPUs, bytes of memory, a share of a GPU."""
    need = planned.need
    if not node.cards:
        num_cpus = max(1, node.num_cpus // (at.most_runs or 1))
        return {"num_cpus": num_cpus, "memory": need.memory_bytes}
    share = math.ceil(_PARTS * need.memory_bytes / at.memory_bytes) / _PARTS
    return {"num_cpus": 1, "num_gpus": min(1.0, share), "memory": need.host_bytes}


@contextmanager
def _own_signals() -> Iterator[None]:
    """What was said to happen on SIGTERM stays so; Ray would have it end the process."""
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, before)


def _device(nodes: Sequence[Node]) -> Device:
    cards = [one for node in nodes for one in node.cards]
    if cards:
        largest = max(cards, key=lambda one: one.free_bytes)
        named = card(largest.name, largest.total_bytes, largest.capability)
        return replace(named, memory_bytes=largest.free_bytes)
    memory = max((node.memory_bytes for node in nodes), default=0)
    # Without the memory of this machine, which is not the one that trains.
    return replace(find_device("cpu"), memory_bytes=memory, host_memory_bytes=None)


def _node(values: Mapping[str, Any]) -> Node:
    found = values["Resources"]
    return Node(
        name=f"{values['NodeManagerHostname']}-{values['NodeID'][:6]}",
        node_id=values["NodeID"],
        num_cpus=int(found.get("CPU", 0)),
        memory_bytes=int(found.get("memory", 0)),
        cards=_cards_of(values["NodeID"]) if found.get("GPU") else (),
    )


def _cards_of(node_id: str) -> Sequence[Card]:
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    asked = ray.remote(_cards_there).options(num_cpus=0, scheduling_strategy=there).remote()
    try:
        return ray.get(asked, timeout=_DESCRIBE_SECONDS)
    except RayError:
        return ()


def _cards_there() -> list[Card]:
    """The cards of the machine of this task, which has none of its own."""
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    return read_cards()


def _train_there(
    values: dict[str, Any],
    place: tuple[str, str, str],
    *,
    environment: Mapping[str, str],
    train: Sequence[str],
    folder: str,
) -> tuple[int, str, float]:
    """A task: the run in a process of its own, from the same folder as everywhere."""
    out, name, at = Path(place[0]), place[1], place[2]
    with suppress(OSError):
        os.chdir(folder)
    machine = Machine(list, train)
    found = machine.at_work(out, [name])
    if found:
        handle = found[name][0]
    else:
        run = RunConfig.model_validate(values)
        handle = machine.start_named(run, out, name, at=Place(at, 0))
    try:
        while (ended := machine.ended(handle)) is None:
            if (out / f".{name}.stop").exists():
                machine.stop([handle])
            time.sleep(_POLL_SECONDS)
    except BaseException:
        machine.stop([handle])
        raise
    return ended.exit_code, ended.reason, ended.seconds
