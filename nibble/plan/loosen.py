"""What a person could change so that a run fits: of each kind of change the smallest.

settings of theirs given back to the planner, 4 bits, shorter rows, a lower rank too
"""

from collections.abc import Callable, Iterator
from typing import Any

from nibble.config import RunConfig

# Settings that the planner chooses where a run leaves them open.
_OPEN = {
    "train.micro_batch_size": "auto",
    "train.recompute": "auto",
    "optim.paged": "auto",
}
_SHORTEST = 64
_MOST = 2

Change = dict[str, Any]


def changes_that_fit(
    run: RunConfig, would_fit: Callable[[RunConfig], bool], *, is_base_too_large: bool
) -> list[str]:
    """Up to two changes with which the run fits, as a person would write them.

    Args:
        would_fit: Whether a run with other settings fits.
        is_base_too_large: Whether the weights alone do not fit as they are stored.
    """

    def fits(change: Change) -> bool:
        return would_fit(run.with_values(change, "planner"))

    found: list[Change] = []
    for kind in _kinds(run, found, is_base_too_large=is_base_too_large):
        known = [change for change in kind if not any(f.items() <= change.items() for f in found)]
        smallest = _smallest(known, fits)
        if smallest:
            found.append(smallest)
        if len(found) == _MOST:
            break
    return [", ".join(f"{k}={v}" for k, v in change.items()) for change in found]


def _kinds(
    run: RunConfig, found: list[Change], *, is_base_too_large: bool
) -> Iterator[list[Change]]:
    """Changes of each kind, the smallest first; of one kind each asks for more than the last.

    Several kinds at once only where none alone was `found`.
    """
    flat = run.flat()
    # What is set to the least memory already stays.
    given = {key: value for key, value in _OPEN.items() if flat[key] not in (value, True, 1)}
    if not is_base_too_large:
        singles = [{key: value} for key, value in given.items()]
        yield from ([single] for single in singles)
        if len(singles) > 1:
            yield [given]
    if run.method in ("lora", "full"):
        yield [{"method": "qlora"}, *([{"method": "qlora", **given}] if given else [])]
    if is_base_too_large:
        return
    halved = [{"lora.rank": rank} for rank in _halvings(run.lora.rank, 1)]
    shorter = [{"data.max_seq_len": n} for n in _halvings(run.data.max_seq_len, _SHORTEST)]
    if run.method != "full":
        yield halved
    yield shorter
    if run.method != "full" and halved and not found:
        yield [{**halved[-1], **given, **change} for change in shorter]


def _halvings(number: int, smallest: int) -> list[int]:
    return [number >> times for times in range(1, 24) if number >> times >= smallest]


def _smallest(changes: list[Change], fits: Callable[[Change], bool]) -> Change | None:
    """The first that fits, where all after one that fits do as well."""
    # Mostly the first or the second is enough, and each question costs a simulation.
    for change in changes[:2]:
        if fits(change):
            return change
    if len(changes) < 3 or not fits(changes[-1]):
        return None
    low, high = 2, len(changes) - 1
    while low < high:
        middle = (low + high) // 2
        if fits(changes[middle]):
            high = middle
        else:
            low = middle + 1
    return changes[low]
