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
    for kind in _kinds(run, is_base_too_large=is_base_too_large):
        smallest = _smallest(kind, fits)
        if smallest:
            found.append(smallest)
        if len(found) == _MOST:
            break
    return [", ".join(f"{k}={v}" for k, v in change.items()) for change in found]


def _kinds(run: RunConfig, *, is_base_too_large: bool) -> Iterator[list[Change]]:
    """Changes of each kind, the smallest first; of one kind each asks for more than the last."""
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
    shorter = [run.data.max_seq_len >> halvings for halvings in range(1, 15)]
    lengths = [{"data.max_seq_len": length} for length in shorter if length >= _SHORTEST]
    yield lengths
    if run.method != "full":
        rank = max(1, run.lora.rank // 4)
        yield [{"lora.rank": rank, **length} for length in lengths]


def _smallest(changes: list[Change], fits: Callable[[Change], bool]) -> Change | None:
    """The first that fits, where all after one that fits do as well."""
    if not changes or not fits(changes[-1]):
        return None
    low, high = 0, len(changes) - 1
    while low < high:
        middle = (low + high) // 2
        if fits(changes[middle]):
            high = middle
        else:
            low = middle + 1
    return changes[low]
