"""Which waiting runs start on which device: never more than fit.

A run takes what its plan predicts of the memory of one device and of the machine around it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Place:
    """A device that runs are put on.

    Attributes:
        name: Such as "cuda:0".
        memory_bytes: What runs may take of it together.
        most_runs: So many at a time; None is as many as fit.
        host: The machine it is in.
        host_bytes: What runs may take of that machine's memory; None is unknown.
        environment: What the process of a run needs to see this device alone.
    """

    name: str
    memory_bytes: int
    most_runs: int | None = None
    host: str = ""
    host_bytes: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Need:
    """What a run takes: memory of a device, and of the machine around it."""

    memory_bytes: int
    host_bytes: int = 0


def assign(
    waiting: Mapping[str, Need], places: Sequence[Place], at_work: Iterable[tuple[str, Need]]
) -> dict[str, str]:
    """The runs that can start now, each with the name of its place.

    The largest goes first. Of the places where it fits it gets the one with the fewest runs, and
    of those the one with the most room.

    Args:
        waiting: The runs by name, in the order in which those of a size start.
        at_work: The place and the need of every run at work; a place that is gone does not count.
    """
    left = {place.name: _Left(place) for place in places}
    hosts = {place.host: place.host_bytes for place in places}
    for name, need in at_work:
        if name in left:
            _take(left, hosts, name, need)
    found: dict[str, str] = {}
    for run, need in sorted(waiting.items(), key=lambda item: -item[1].memory_bytes):
        fitting = [one for one in left.values() if _fits(one, hosts, need)]
        if fitting:
            best = min(fitting, key=lambda one: (one.num_runs, -one.free_bytes))
            found[run] = best.place.name
            _take(left, hosts, best.place.name, need)
    return found


def fits_alone(need: Need, places: Sequence[Place]) -> bool:
    """Whether a run fits a place that has no other."""
    return bool(assign({"": need}, places, ()))


@dataclass(frozen=True)
class _Left:
    """What a place has left."""

    place: Place
    num_runs: int = 0
    taken_bytes: int = 0

    @property
    def free_bytes(self) -> int:
        return self.place.memory_bytes - self.taken_bytes


def _fits(left: _Left, hosts: Mapping[str, int | None], need: Need) -> bool:
    most, host_bytes = left.place.most_runs, hosts[left.place.host]
    return (
        need.memory_bytes <= left.free_bytes
        and (most is None or left.num_runs < most)
        and (host_bytes is None or need.host_bytes <= host_bytes)
    )


def _take(left: dict[str, _Left], hosts: dict[str, int | None], name: str, need: Need) -> None:
    old = left[name]
    left[name] = replace(
        old, num_runs=old.num_runs + 1, taken_bytes=old.taken_bytes + need.memory_bytes
    )
    free = hosts[old.place.host]
    hosts[old.place.host] = None if free is None else free - need.host_bytes
