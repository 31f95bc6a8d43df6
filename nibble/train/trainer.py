"""train(run, emit): build, loop, finish."""

import platform
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from nibble.config import RunConfig, check_run, interval_seconds
from nibble.data.dataset import Dataset
from nibble.data.loader import Batch, eval_batches
from nibble.disk import disk_errors, fault, file_sha256
from nibble.errors import NonFiniteError, UsageError
from nibble.events import (
    CheckpointSaved,
    Emit,
    EvalEnd,
    EventLog,
    PagesMoved,
    PlanMade,
    RunEnd,
    RunStart,
    StepEnd,
    WarningRaised,
)
from nibble.train import checkpoint, folder, history
from nibble.train.checkpoint import TrainState
from nibble.train.evaluate import EVAL_TOKENS, evaluate
from nibble.train.exact import check_environment, exactness, threads_of
from nibble.train.interrupt import Asked, StopSignal, stop_signals
from nibble.train.job import Job, build_job, open_keys
from nibble.train.manifest import (
    differences,
    environment,
    identity_of,
    read_manifest,
    write_manifest,
)
from nibble.train.memory import is_roomy, keep_heap_dense
from nibble.train.nonfinite import REPORT_FILE, write_report
from nibble.train.optimizer import learning_rate
from nibble.train.paging import PagedMoments
from nibble.train.pressure import out_of_memory_named, rehearse, step_within_memory
from nibble.train.report import Reporter
from nibble.train.result import Result, read_result, write_result
from nibble.train.resume import check_steps, find_state, standing_table

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


def train(
    run: RunConfig,
    emit: Emit = lambda event: None,
    *,
    plan: Mapping[str, Any] | None = None,
    dataset: Dataset | None = None,
    allow_change: Collection[str] = (),
) -> Result:
    """Train as `run` says, or continue what stands in its folder, which the caller holds.

    Args:
        run: Concrete values; `nibble.train` resolves `auto` first.
        emit: Receives every event, in order.
        plan: What was planned, as `Plan.to_dict` gives it; recorded in the run folder.
        dataset: The rows where they were read already.
        allow_change: What may have changed since the run began: see `identity_of`.

    Raises:
        NibbleError: One of its kinds, each with an exit code; see `nibble.errors`.
    """
    check_run(run)
    if open_keys(run):
        raise UsageError(f"{', '.join(open_keys(run))}: auto must be planned first")
    out = folder.folder_of(run)
    with disk_errors(f"{out}: a file cannot be read or written"):
        changed = folder.check_changes(run, allow_change)
        if folder.is_finished(out) and not changed:
            return read_result(out)
        if not folder.has_begun(out):
            folder.write_run(run)
        predicted = folder.record_plan(out, plan)
        began_with = read_manifest(out)[1] if run.train.exactness == "exact" else {}
        with closing(EventLog(out / folder.EVENTS_FILE)) as log, threads_of(began_with):
            report = Reporter(log, emit)
            with report.end_told():
                _train(run, report, predicted, dataset, allow_change)
        return read_result(out)


def _train(
    run: RunConfig,
    report: Reporter,
    predicted: Mapping[str, Any],
    dataset: Dataset | None,
    allow_change: Collection[str],
) -> None:
    has_room = bool(predicted) and is_roomy(predicted["peak_memory_bytes"])
    is_dense = bool(predicted) and not has_room and keep_heap_dense()
    with (
        stop_signals() as stop,
        out_of_memory_named(run, predicted),
        exactness(run.train.exactness),
    ):
        report(PlanMade(_planned(run), list(predicted.get("reasons", ()))))
        job = build_job(run, folder.folder_of(run), report, dataset)
        state, identity = _restore(job, report, allow_change)
        course = Course(job, state, identity, stop, report, state.step or None)
        is_whole = state.step == 0
        _fit(course, has_room=has_room)
        _finish(course)
    if predicted:
        has_no_holes = is_dense or job.device.type == "cuda"
        _remember(job, predicted, is_comparable=is_whole and has_no_holes)


def _restore(
    job: Job, report: Reporter, allow_change: Collection[str]
) -> tuple[TrainState, dict[str, str]]:
    """The state to go on from and the identity of the run, after saying that it starts."""
    run, now = job.run, environment()
    identity = identity_of(run, job.tokenizer, job.dataset)
    checkpoints = job.out / folder.CHECKPOINTS
    checkpoint.check_room(checkpoints, job.optimizer, has_eval=bool(job.dataset.eval))
    state, changed = find_state(
        checkpoints, job.optimizer, identity=identity, allow_change=allow_change, emit=report
    )
    began_with = read_manifest(job.out)[1] if state.step else now
    if state.step:
        check_steps(state.step, job.steps)
        warning = check_environment(run.train.exactness, began_with, now)
        if warning:
            report(WarningRaised(warning))
        changed += differences(began_with, now) if began_with else []
        if "train.micro_batch_size" not in allow_change:
            job.loader.micro_batch_size = state.micro_batch_size
    folder.write_run(run)
    write_manifest(job.out, identity, began_with or now)
    report.seconds, report.tokens = state.seconds, state.tokens
    report.table = standing_table(job.out, state.step, report)
    report(
        RunStart(
            method=run.method,
            model=run.model.name,
            device=str(job.device),
            steps=job.steps,
            steps_done=state.step,
            num_train_rows=len(job.dataset.train),
            num_eval_rows=len(job.dataset.eval),
            versions={"python": platform.python_version(), "torch": torch.__version__},
            num_threads=torch.get_num_threads(),
            changed=changed,
        )
    )
    return state, identity


def _fit(course: Course, *, has_room: bool) -> None:
    job, state, stop = course.job, course.state, course.stop
    within = interval_seconds(job.run.train.stop_within, "train.stop_within")
    job.model.train()
    if state.step == 0:
        _evaluate(course)
    if not has_room:
        rehearse(job.token_loss, job.loader, job.steps, job.optimizer, emit=course.report)
    if state.step:
        stop.standing = f"step {state.step} of {job.steps} is saved"
        if state.is_eval_due and _evaluate(course) and state.is_best:
            _save(course)
    while state.step < job.steps:
        with stop.patience(within):
            _step(course)
            if state.is_eval_due:
                _evaluate(course)
            if state.step == job.steps or stop.name or _is_save_due(course):
                _save(course)
        if stop.name:
            raise stop.error()


def _step(course: Course) -> None:
    """One optimizer step; what the state says afterwards can be saved."""
    job, state, optim = course.job, course.state, course.job.run.optim
    lr = learning_rate(
        state.step,
        steps=job.steps,
        peak=optim.lr,
        warmup=optim.warmup,
        schedule=optim.schedule,
    )
    start = time.monotonic()
    passes = partial(job.loader.micro_batches, state.step)
    with _nonfinite_reported(job, state.step + 1, passes):
        result = step_within_memory(
            job.token_loss,
            job.loader,
            state.step,
            job.optimizer,
            lr=lr,
            max_grad_norm=optim.max_grad_norm,
            emit=course.report,
        )
    seconds = time.monotonic() - start
    state.step += 1
    state.tokens += result.tokens
    state.seconds += seconds
    state.micro_batch_size = job.loader.micro_batch_size
    state.eval_loss = None
    is_due = _is_due(job.run.train.eval_every, state.step) and state.step < job.steps
    state.is_eval_due = is_due and bool(job.dataset.eval)
    fault("train.after_step")
    course.report(
        StepEnd(
            step=state.step,
            loss=result.loss,
            num_target_tokens=result.num_target_tokens,
            tokens=result.tokens,
            learning_rate=lr,
            grad_norm=result.grad_norm,
            seconds=seconds,
            tokens_per_s=result.tokens / max(seconds, 1e-9),
            peak_memory_bytes=job.peak.bytes(),
        )
    )


@contextmanager
def _nonfinite_reported(
    job: Job, step: int, batches: Callable[[], Iterable[Batch]], *, is_held_out: bool = False
) -> Iterator[None]:
    """An error that leaves the block names the file that says which rows and modules it is of."""
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
            )
            more = f" ({path} has more)"
        raise NonFiniteError(f"step {step}: {error.what}{more}", fix=error.fix) from None


def _finish(course: Course) -> None:
    job, state, report = course.job, course.state, course.report
    fault("train.before_finish")
    course.stop.standing = f"all {job.steps} steps are saved"
    adapter = write_result(job, state, _evaluate(course))
    (job.out / REPORT_FILE).unlink(missing_ok=True)
    weights = sorted(adapter.glob("*.safetensors"))
    report(
        RunEnd(
            reason=folder.FINISHED,
            seconds=state.seconds,
            tokens=state.tokens,
            peak_memory_bytes=job.peak.bytes(),
            predicted_peak_memory_bytes=folder.read_plan(job.out).get("peak_memory_bytes"),
            adapter=str(adapter),
            adapter_bytes=sum(path.stat().st_size for path in weights),
            adapter_sha256={path.name: file_sha256(path) for path in weights},
        )
    )
    report.log.sync()


def _remember(job: Job, plan: Mapping[str, Any], *, is_comparable: bool) -> None:
    """What was planned and what it took, for the plans of later runs; halved passes took less."""
    as_planned = job.loader.micro_batch_size == int(job.run.train.micro_batch_size)
    history.record(
        plan["device"],
        job.run.method,
        job.run.model.name,
        predicted=plan["uncorrected_peak_memory_bytes"],
        measured=job.peak.bytes(),
        is_comparable=is_comparable and as_planned,
    )


def _evaluate(course: Course) -> EvalEnd | None:
    """Measure the held-out loss where the run stands.

    A run that is asked to stop meanwhile measures it when it is continued.
    """
    job, state, stop = course.job, course.state, course.stop
    if not job.dataset.eval or stop.name:
        return None
    batches = partial(eval_batches, job.dataset.eval, max_tokens=EVAL_TOKENS)
    try:
        with _nonfinite_reported(job, state.step, batches, is_held_out=True):
            end = evaluate(
                job.model,
                stop.until_asked(batches()),
                step=state.step,
                autocast=job.autocast,
                device=job.device,
            )
    except Asked:
        return None
    course.report(end)
    best = end.loss if state.best_eval_loss is None else state.best_eval_loss
    state.eval_loss, state.best_eval_loss = end.loss, min(end.loss, best)
    state.is_eval_due = False
    return end


def _save(course: Course) -> None:
    job, state, report = course.job, course.state, course.report
    start = time.monotonic()
    # What stands in the checkpoint stands in the log as well, whatever happens.
    report.log.sync()
    passes = partial(job.loader.micro_batches, state.step - 1)
    with _nonfinite_reported(job, state.step, passes):
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


def _planned(run: RunConfig) -> dict[str, Any]:
    return {k: v for k, v in run.flat().items() if run.origin(k) == "planner"}


def _is_due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


def _is_save_due(course: Course) -> bool:
    """Whether the interval is over, or the run is at its best; that may take 1 % of the time."""
    every, state = course.job.run.train.save_every, course.state
    if isinstance(every, int):
        return state.is_best or state.step % every == 0
    seconds = time.monotonic() - course.saved_at
    is_cheap = seconds >= SAVE_PAYS_AFTER * course.save_seconds
    return (state.is_best and is_cheap) or seconds >= interval_seconds(every, "train.save_every")
