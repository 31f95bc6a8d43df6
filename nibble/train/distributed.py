"""Ranks: the processes of one run, one a device, which move alike.

    RANK, WORLD_SIZE, LOCAL_RANK       which of them this process is
    MASTER_ADDR, MASTER_PORT           where they meet

That is the contract of torchrun, and all that is read of it. A process without WORLD_SIZE is alone:
every function here gives its argument back then, and no bit is computed otherwise. Rank 0 alone
writes; what the others need of the folder of the run, it sends them.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nibble.errors import NibbleError, StoppedError, UnavailableError
from nibble.train.launch import Place, place_here
from nibble.train.manifest import differences, listed
from nibble.train.pulse import Pulse

# A rank may wait as long for another that plans, saves or writes; that one is alive all the while.
_LONGEST_WAIT = timedelta(hours=2)
_MEETING_SECONDS = 300.0
_STORE_SECONDS = 10.0
# What a broken connection is told by within this time names its reason.
_REASON_SECONDS = 4.0
_FIRST_ENDED = "first ended"
_GLOO = "gloo/transport"
# Names that it takes from C++ and that a type checker does not see there.
_c10d: Any = dist


@dataclass
class Bond:
    """What ties a rank to the others.

    Args:
        store: Where they leave word.
        pulse: Whether they are alive.
        has_shards: Whether a pass of one needs all of them.
        is_agreed: Whether they end together.
    """

    store: Any
    pulse: Pulse
    has_shards: bool = False
    is_agreed: bool = False


@dataclass(frozen=True)
class Ranks:
    """Which process of a run this is.

    Args:
        rank: Its number, from 0.
        world_size: Number of processes.
        bond: None of one that is alone.
    """

    rank: int = 0
    world_size: int = 1
    bond: Bond | None = None

    @property
    def is_first(self) -> bool:
        """Whether this rank writes and reports."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        return self.bond is None

    @property
    def has_shards(self) -> bool:
        """Whether every rank needs the others for a pass: what ends one of them ends all."""
        return self.bond is not None and self.bond.has_shards

    def cut_base(self) -> None:
        """From here on no rank has the whole base."""
        if self.bond is not None:
            self.bond.has_shards = True

    def sums(self, values: Sequence[float]) -> list[float]:
        """Each value summed over all ranks, in float64."""
        return list(values) if self.is_alone else _reduced(values, dist.ReduceOp.SUM)

    def largest(self, value: float) -> float:
        """The largest of all ranks' values."""
        return value if self.is_alone else _reduced([value], dist.ReduceOp.MAX)[0]

    def any(self, value: bool) -> bool:
        """Whether it is so on any rank."""
        return value if self.is_alone else self.largest(float(value)) > 0

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over all ranks, the same bits on each."""
        for tensor in tensors if not self.is_alone else ():
            dist.all_reduce(tensor)

    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by that of rank 0."""
        for tensor in tensors if not self.is_alone else ():
            dist.broadcast(tensor, 0)

    def of_first(self, value: Any) -> Any:
        """What rank 0 gives, as JSON keeps it; the values of the others are not looked at."""
        return value if self.is_alone else self.of_all(value if self.is_first else None)[0]

    def of_all(self, value: Any) -> list[Any]:
        """What every rank gives, in their order, as JSON keeps it."""
        if self.is_alone:
            return [value]
        mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([len(mine)]))
        longest = max(int(size) for size in sizes)
        texts = [torch.zeros(longest, dtype=torch.uint8) for _ in sizes]
        dist.all_gather(texts, torch.cat([mine, mine.new_zeros(longest - len(mine))]))
        pairs = zip(texts, sizes, strict=True)
        return [json.loads(bytes(text[: int(size)].tolist())) for text, size in pairs]

    def check_same(self, values: dict[str, str], kind: type[NibbleError], what: str) -> None:
        """Refuse ranks whose values are not those of rank 0; every rank ends with the same error.

        Raises:
            NibbleError: Of this kind; it names rank and value.
        """
        first, *others = self.of_all(values)
        found = [
            f"rank {rank} ({listed(changed)})"
            for rank, other in enumerate(others, 1)
            if (changed := differences(first, other))
        ]
        if found:
            self.end_together()
            error: Any = kind
            raise error(
                f"the ranks of this run have different {what}, rank 0's first: " + "; ".join(found),
                fix="start every rank with the same code, config, base and data",
            )

    def draw_own(self, seed: int, step: int) -> None:
        """Give this rank other random numbers than rank 0, which goes on with those it has.

        They are a function of seed, step and rank: no checkpoint has to keep them.
        """
        if not self.is_first:
            digest = hashlib.sha256(f"{seed} {step} {self.rank}".encode()).digest()
            torch.manual_seed(int.from_bytes(digest[:7], "little"))

    def end_together(self) -> None:
        """Every rank knows that the run ends here: the others wait until rank 0 has written."""
        if self.bond is not None:
            self.bond.is_agreed = True


ALONE = Ranks()


@contextmanager
def joined() -> Iterator[Ranks]:
    """Within the block this process is tied to the other ranks of its run, if it has any.

    Raises:
        UsageError: If the environment says nonsense.
        UnavailableError: If the others cannot be reached, or there are fewer devices than ranks.
        StoppedError: If another rank is lost.
    """
    place = place_here()
    if place.world_size == 1:
        yield ALONE
        return
    _take_device(place)
    ranks = _join(place)
    bond = ranks.bond
    assert bond is not None, "there are others"
    try:
        with lost_named(ranks):
            yield ranks
            ranks.end_together()
    except BaseException as error:
        if not bond.is_agreed:
            bond.pulse.tell(f"rank {ranks.rank} ended: {_first_line(error)}")
        elif isinstance(error, NibbleError):
            error.is_told = not ranks.is_first
        raise
    finally:
        _part(ranks, bond)


@contextmanager
def lost_named(ranks: Ranks) -> Iterator[None]:
    """Within the block, an operation that fails since another rank is gone says so.

    Raises:
        StoppedError: Then.
    """
    try:
        yield
    except RuntimeError as error:
        if ranks.bond is None or not _is_lost(error):
            raise
        reason = ranks.bond.pulse.reason(_REASON_SECONDS) or "another rank has ended"
        raise StoppedError(reason, fix="run the same command again to continue") from None


def _is_lost(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or _GLOO in str(error)


def _first_line(error: BaseException) -> str:
    text = error.what if isinstance(error, NibbleError) else f"{type(error).__name__}: {error}"
    return text.partition("\n")[0]


def _take_device(place: Place) -> None:
    if not torch.cuda.is_available():
        return
    if place.local_rank >= torch.cuda.device_count():
        raise UnavailableError(
            f"rank {place.rank} is to use device {place.local_rank} of this machine, which has "
            f"{torch.cuda.device_count()}",
            fix="start as many processes on a machine as it has devices",
        )
    torch.cuda.set_device(place.local_rank)


def _join(place: Place) -> Ranks:
    where = f"{place.address}:{place.port}"
    try:
        store = _connected(place, _MEETING_SECONDS, is_server=place.is_server)
        _c10d.PrefixStore("here", store).set(str(place.rank), "1")
        names = [str(rank) for rank in range(place.world_size)]
        _wait(lambda: _c10d.PrefixStore("here", store).check(names), _MEETING_SECONDS)
        beats = _c10d.PrefixStore("pulse", _connected(place, _STORE_SECONDS, is_server=False))
        pulse = Pulse(beats, place.rank, place.world_size)
        pulse.start()
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            store=_c10d.PrefixStore("group", store),
            rank=place.rank,
            world_size=place.world_size,
            timeout=_LONGEST_WAIT,
        )
    except RuntimeError as error:
        raise UnavailableError(
            f"rank {place.rank} cannot reach the others at {where}: {_first_line(error)}",
            fix="check that every machine reaches that address and port",
        ) from None
    return Ranks(place.rank, place.world_size, Bond(store, pulse))


def _connected(place: Place, wait_seconds: float, *, is_server: bool) -> Any:
    """The store of all ranks; every call is a connection of its own."""
    store = _c10d.TCPStore(
        place.address,
        place.port,
        is_master=is_server,
        timeout=timedelta(seconds=wait_seconds),
        wait_for_workers=False,
    )
    return _c10d.PrefixStore(f"nibble/{place.attempt}", store)


def _wait(is_over: Callable[[], bool | str], most_seconds: float) -> None:
    """Look again and again: a signal is heard in between."""
    give_up = time.monotonic() + most_seconds
    while not is_over():
        if time.monotonic() > give_up:
            raise UnavailableError(
                f"not all ranks came within {most_seconds:g} s",
                fix="start the same command on every machine; its log says what became of it",
            )
        time.sleep(0.02)


def _part(ranks: Ranks, bond: Bond) -> None:
    """End: the others once rank 0 has written what they agreed on, and it after they let go."""
    others = [f"left/{rank}" for rank in range(1, ranks.world_size)]
    wait_seconds = _MEETING_SECONDS if not ranks.is_first else _REASON_SECONDS
    # The machine of rank 0 may be gone, and with it the store.
    with suppress(RuntimeError, UnavailableError):
        if ranks.is_first:
            bond.store.set(_FIRST_ENDED, "1")
        elif bond.is_agreed:
            _wait(lambda: bond.pulse.lost or bond.store.check([_FIRST_ENDED]), wait_seconds)
    bond.pulse.stop()
    with suppress(RuntimeError, UnavailableError):
        if not ranks.is_first:
            bond.store.set(others[ranks.rank - 1], "1")
        elif bond.is_agreed:
            _wait(lambda: bond.store.check(others), wait_seconds)
    # After an error it might wait for operations that never end.
    if bond.is_agreed:
        dist.destroy_process_group()


def _reduced(values: Sequence[float], operation: Any) -> list[float]:
    tensor = torch.tensor(list(values), dtype=torch.float64)
    dist.all_reduce(tensor, operation)
    return tensor.tolist()
