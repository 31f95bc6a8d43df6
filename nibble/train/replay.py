"""Run a finished run once more from its folder, and compare what comes out bit by bit."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import torch

from nibble.config import RunConfig
from nibble.data.dataset import Dataset, build_dataset
from nibble.disk import disk_errors, file_sha256
from nibble.errors import DataError, FolderInUseError, NibbleError, UnavailableError, UsageError
from nibble.events import Emit, RunEnd, RunStart, StepEnd, last_attempts, read_events
from nibble.model.files import find_model
from nibble.model.tokenizer import load_tokenizer
from nibble.train import checkpoint, folder, trainer
from nibble.train.exact import threads_of
from nibble.train.manifest import (
    MANIFEST_FILE,
    differences,
    identity_of,
    listed,
    read_manifest,
)

# Step, what was measured, and its values.
Figure = tuple[int, str, float, float]
_TRAINING = "training loss"


@dataclass(frozen=True)
class Replay:
    """What two runs have in common.

    Attributes:
        sha256: Of every file of weights.
        num_steps: Steps of the same loss and norm of the gradient.
        num_evals: Evaluations of the same loss and accuracy.
    """

    sha256: dict[str, str]
    num_steps: int
    num_evals: int


def replay(out: Path, into: Path, emit: Emit = lambda event: None) -> Replay:
    """Run what stands in `out` once more in the folder `into`; both must come out equal.

    Args:
        into: Empty, or with an earlier attempt of this, which is continued.

    Raises:
        UsageError: If there is no finished run in `out`.
        DataError: If the run would be made of something else now, or was on its way, or what it
            wrote is not there any more; nothing is run.
        FolderInUseError: If there is something else in `into`.
        UnavailableError: If another environment, now or on the way, gave other bits.
        NibbleError: If the same environment gave other bits.
        DiskError: If a file cannot be read or written.
    """
    with disk_errors(f"{out}: a file cannot be read or written"):
        return _replay(out, into, emit)


def _replay(out: Path, into: Path, emit: Emit) -> Replay:
    if into.resolve().is_relative_to(out.resolve()):
        raise FolderInUseError(
            f"{into} is not empty: it is the run itself", fix="choose another --out"
        )
    run, end = folder.read_run(out), folder.last_end(out)
    identity, environment = read_manifest(out)
    if run is None or end is None or end.reason != folder.FINISHED:
        raise UsageError(f"there is no finished run in {out}", fix="finish it with `nibble train`")
    _check_whole(out, end, identity)
    on_the_way = _changed_on_the_way(out)
    _check_repeatable(out, [name for name in on_the_way if name in identity])
    again = run.with_values({"out": str(into)}, "flag")
    standing = folder.read_run(into)
    if standing is None or folder.changed_keys(standing, again):
        folder.refuse_content(into)
    dataset = _same_dataset(again, identity, out)
    with folder.hold(into), threads_of(environment):
        trainer.train(again, emit, plan=folder.read_plan(out) or None, dataset=dataset)
    first, second = _figures(out), _figures(into)
    parted = next((a or b for a, b in zip_longest(first, second) if a != b), None)
    end_again = folder.last_end(into)
    has_equal_weights = end_again is not None and end.adapter_sha256 == {
        path.name: file_sha256(path) for path in folder.weights(into, end_again)
    }
    if parted is not None or not has_equal_weights:
        changed = [f"{name} on the way" for name in on_the_way]
        apart = {**differences(environment, read_manifest(into)[1]), **_pass_sizes(out, into)}
        changed += [listed(apart)] if apart else []
        raise _unequal(run, f"{out} and {into}", parted, ", ".join(changed))
    num_steps = sum(what == _TRAINING for _, what, *_ in first)
    return Replay(end.adapter_sha256, num_steps, len(first) - num_steps)


def _check_whole(out: Path, end: RunEnd, identity: Mapping[str, str]) -> None:
    """What a finished run wrote is there, and as it was written."""
    steps = [step for step, what, *_ in _figures(out) if what == _TRAINING]
    fix = "bring the folder back as the run left it"
    if not identity:
        raise DataError(f"{out / MANIFEST_FILE} does not say what the run was made of", fix=fix)
    if not steps or steps != list(range(1, len(steps) + 1)):
        raise DataError(f"{out / folder.EVENTS_FILE} does not have every step", fix=fix)
    for path in folder.weights(out, end):
        if not path.is_file() or file_sha256(path) != end.adapter_sha256[path.name]:
            raise DataError(f"{path} is not what the run wrote", fix=fix)
    if not end.adapter_sha256:
        raise DataError(f"{out / folder.EVENTS_FILE} does not say what the run wrote", fix=fix)


def _changed_on_the_way(out: Path) -> list[str]:
    """The names of what was not as before when the run went on."""
    starts = (e for e in read_events(out / folder.EVENTS_FILE) if isinstance(e, RunStart))
    return sorted({str(name) for start in starts for name in start.changed})


def _check_repeatable(out: Path, changed: list[str]) -> None:
    if changed:
        raise DataError(
            f"{out} was changed on its way ({', '.join(changed)})",
            fix="only a run that kept what it was made of can be repeated from its start",
        )


def _pass_sizes(out: Path, into: Path) -> dict[str, tuple[str, str]]:
    """Rows in a forward pass at the end of both, where memory ran short in one of them."""
    ends = [checkpoint.latest(each / folder.CHECKPOINTS)[0] for each in (out, into)]
    first, second = (str(found.state.micro_batch_size) if found else "" for found in ends)
    return {} if first == second else {"rows in a forward pass": (first, second)}


def _same_dataset(run: RunConfig, identity: dict[str, str], out: Path) -> Dataset:
    """The rows of the run, if it is made of what it was made of."""
    tokenizer = load_tokenizer(find_model(run.model.name, run.model.revision))
    dataset = build_dataset(run.data, tokenizer, seed=run.train.seed)
    changed = differences(identity, identity_of(run, tokenizer, dataset))
    if changed:
        raise DataError(
            f"{out} was made of something else ({listed(changed)})",
            fix="bring that back: without it the same cannot come out",
        )
    return dataset


def _figures(out: Path) -> list[Figure]:
    """What a run computed at each step, in order."""
    events = last_attempts(read_events(out / folder.EVENTS_FILE), sys.maxsize)
    return [
        (event.step, _TRAINING, event.loss, event.grad_norm)
        if isinstance(event, StepEnd)
        else (event.step, "held-out loss", event.loss, event.token_accuracy)
        for event in events
    ]


def _unequal(run: RunConfig, both: str, parted: Figure | None, changed: str) -> NibbleError:
    where = f"the {parted[1]} of step {parted[0]} on" if parted else "the weights"
    what = f"{both} are not equal, from {where}"
    if changed:
        return UnavailableError(
            f"{what}; they did not run in the same environment throughout ({changed})",
            fix="the same inputs give the same bits in the same environment, from start to end",
        )
    fix = "please report it, with both folders"
    if run.train.exactness != "exact" and torch.cuda.is_available():
        fix = "train with train.exactness=exact: on a GPU the default differs from run to run"
    return NibbleError(f"{what}; inputs and environment are the same", fix=fix)
