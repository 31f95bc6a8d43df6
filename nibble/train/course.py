"""A run on its way: what it measures, what it saves, and what it says where a number is none."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

from nibble.config import interval_seconds
from nibble.data.loader import Batch, eval_batches
from nibble.errors import NonFiniteError
from nibble.events import CheckpointSaved, EvalEnd, PagesMoved
from nibble.train import checkpoint, folder
from nibble.train.checkpoint import TrainState
from nibble.train.evaluate import EVAL_TOKENS, evaluate
from nibble.train.interrupt import Asked, StopSignal
from nibble.train.job import Job
from nibble.train.nonfinite import write_report
from nibble.train.paging import PagedMoments
from nibble.train.report import Reporter

# A save beside those of the interval waits for so many times the time that the last one took.
SAVE_PAYS_AFTER = 100


@dataclass
class Course:
    """A run on its way.

    Args:
        job: What it is made of.
        state: Where it stands.
        identity: What must not change while it is continued.
        stop: What was asked of it meanwhile.
        report: Where its events go.
        resumed_from: The step whose checkpoint it went on from.
        saved_at: When the last checkpoint was written, or the loop began.
        save_seconds: How long that took.
    """

    job: Job
    state: TrainState
    identity: dict[str, str]
    stop: StopSignal
    report: Reporter
    resumed_from: int | None
    saved_at: float = field(default_factory=time.monotonic)
    save_seconds: float = 0.0


@contextmanager
def nonfinite_reported(
    job: Job, step: int, batches: Callable[[], Iterable[Batch]], *, is_held_out: bool = False
) -> Iterator[None]:
    """An error that leaves the block names the file that says which rows and modules it is of.

    Args:
        batches: What the step or the evaluation was made of, over all ranks.
    """
    try:
        yield
    except NonFiniteError as error:
        more = ""
        with suppress(OSError):  # a full disk does not hide what happened
            path = write_report(
                job.out,
                job.model,
                job.token_loss,
                batches(),
                step=step,
                reason=error.what,
                is_held_out=is_held_out,
                is_written=job.ranks.is_first,
            )
            more = f" ({path} has more)"
        raise NonFiniteError(f"step {step}: {error.what}{more}", fix=error.fix) from None


def measure(course: Course) -> EvalEnd | None:
    """Measure the held-out loss where the run stands.

    A run that is asked to stop meanwhile measures it when it is continued.
    """
    job, state, stop = course.job, course.state, course.stop
    if not job.dataset.eval or stop.asked():
        return None
    batches = partial(eval_batches, job.dataset.eval, max_tokens=EVAL_TOKENS)
    try:
        with nonfinite_reported(job, state.step, batches, is_held_out=True):
            end = evaluate(
                job.model,
                stop.until_asked(batches()),
                step=state.step,
                autocast=job.autocast,
                device=job.device,
                ranks=job.ranks,
            )
    except Asked:
        return None
    course.report(end)
    best = end.loss if state.best_eval_loss is None else state.best_eval_loss
    state.eval_loss, state.best_eval_loss = end.loss, min(end.loss, best)
    state.is_eval_due = False
    return end


def save(course: Course) -> None:
    """Save where the run stands; of several ranks the first one does, the others only check."""
    job, state, report = course.job, course.state, course.report
    start = time.monotonic()
    # What stands in the checkpoint stands in the log as well, whatever happens.
    report.sync()
    passes = partial(job.loader.all_batches, state.step - 1)
    with nonfinite_reported(job, state.step, passes):
        if not job.ranks.is_alone:
            _check_finite(job)
        if not job.ranks.is_first:
            return
        saved = checkpoint.save(
            job.out / folder.CHECKPOINTS,
            state,
            job.optimizer,
            identity=course.identity,
            resumed_from=course.resumed_from,
        )
    course.stop.standing = f"step {state.step} of {job.steps} is saved"
    course.saved_at = time.monotonic()
    course.save_seconds = course.saved_at - start
    report(CheckpointSaved(state.step, str(saved), course.save_seconds))
    moments = job.optimizer.moments
    if isinstance(moments, PagedMoments):
        report(
            PagesMoved(
                state.step,
                pages_in=moments.pages_in,
                pages_out=moments.pages_out,
                bytes_moved=moments.bytes_moved,
                stall_seconds=moments.stall_seconds,
            )
        )


def _check_finite(job: Job) -> None:
    try:
        checkpoint.check_finite(job.optimizer.state_pieces())
    except NonFiniteError:
        job.ranks.end_together()
        raise


def is_save_due(course: Course) -> bool:
    """Whether the interval is over, or the run is at its best; that may take 1 % of the time.

    Ranks follow the clock of the first.
    """
    every, state = course.job.run.train.save_every, course.state
    if isinstance(every, int):
        return state.is_best or state.step % every == 0
    seconds = time.monotonic() - course.saved_at
    is_cheap = seconds >= SAVE_PAYS_AFTER * course.save_seconds
    is_over = seconds >= interval_seconds(every, "train.save_every")
    return course.job.ranks.of_first((state.is_best and is_cheap) or is_over)
