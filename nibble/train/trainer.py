"""train(run, emit): build, loop, finish."""

import platform
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nibble.config import RunConfig, check_run, interval_seconds
from nibble.data.dataset import Dataset
from nibble.disk import disk_errors, fault, file_sha256
from nibble.errors import DataError, UsageError
from nibble.events import (
    Emit,
    EventLog,
    PlanMade,
    RunEnd,
    RunStart,
    StepEnd,
    WarningRaised,
)
from nibble.train import checkpoint, folder, history
from nibble.train.checkpoint import TrainState
from nibble.train.course import Course, is_save_due, measure, nonfinite_reported, save
from nibble.train.distributed import ALONE, Ranks, lost_named
from nibble.train.exact import check_environment, exactness, threads_of
from nibble.train.interrupt import stop_signals
from nibble.train.job import Job, build_job, open_keys
from nibble.train.manifest import (
    differences,
    environment,
    identity_of,
    read_manifest,
    write_manifest,
)
from nibble.train.memory import is_roomy, keep_heap_dense
from nibble.train.nonfinite import REPORT_FILE
from nibble.train.optimizer import learning_rate
from nibble.train.pressure import out_of_memory_named, rehearse, step_within_memory
from nibble.train.report import Reporter
from nibble.train.result import Result, share_result, write_result
from nibble.train.resume import check_steps, find_state, share_state, standing_table


def train(
    run: RunConfig,
    emit: Emit = lambda event: None,
    *,
    plan: Mapping[str, Any] | None = None,
    dataset: Dataset | None = None,
    allow_change: Collection[str] = (),
    ranks: Ranks = ALONE,
) -> Result:
    """Train as `run` says, or continue what stands in its folder, which the caller holds.

    Args:
        run: Concrete values; `nibble.train` resolves `auto` first.
        emit: Receives every event, in order; that of rank 0 does.
        plan: What was planned, as `Plan.to_dict` gives it; recorded in the run folder.
        dataset: The rows where they were read already.
        allow_change: What may have changed since the run began: see `identity_of`.
        ranks: The processes of the run. The first alone holds, reads and writes the folder.

    Raises:
        NibbleError: One of its kinds, each with an exit code; see `nibble.errors`.
    """
    check_run(run)
    if open_keys(run):
        raise UsageError(f"{', '.join(open_keys(run))}: auto must be planned first")
    out = folder.folder_of(run)
    with disk_errors(f"{out}: a file cannot be read or written"):
        is_done, predicted, began_with = ranks.of_first(
            _begin(run, plan, allow_change) if ranks.is_first else None
        )
        if is_done:
            return share_result(out, ranks)
        with _log_of(out, ranks) as log, threads_of(began_with):
            report = Reporter(log, emit)
            with report.end_told():
                _train(run, report, predicted, dataset, allow_change, ranks)
        return share_result(out, ranks)


@contextmanager
def _log_of(out: Path, ranks: Ranks) -> Iterator[EventLog | None]:
    if not ranks.is_first:
        yield None
        return
    with closing(EventLog(out / folder.EVENTS_FILE)) as log:
        yield log


def _begin(
    run: RunConfig, plan: Mapping[str, Any] | None, allow_change: Collection[str]
) -> tuple[bool, dict[str, Any], dict[str, str]]:
    """Whether the run is finished; else what was planned for it and the environment it began in."""
    out = folder.folder_of(run)
    changed = folder.check_changes(run, allow_change)
    if folder.is_finished(out) and not changed:
        return True, {}, {}
    if not folder.has_begun(out):
        folder.write_run(run)
    predicted = folder.record_plan(out, plan)
    return False, predicted, read_manifest(out)[1] if run.train.exactness == "exact" else {}


def _train(
    run: RunConfig,
    report: Reporter,
    predicted: Mapping[str, Any],
    dataset: Dataset | None,
    allow_change: Collection[str],
    ranks: Ranks,
) -> None:
    has_room = ranks.of_first(bool(predicted) and is_roomy(predicted["peak_memory_bytes"]))
    is_dense = bool(predicted) and not has_room and keep_heap_dense()
    with (
        stop_signals() as stop,
        out_of_memory_named(run, predicted),
        exactness(run.train.exactness),
        lost_named(ranks),
    ):
        stop.agree = ranks.largest
        report(PlanMade(_planned(run), list(predicted.get("reasons", ()))))
        job = build_job(run, folder.folder_of(run), report, dataset, ranks)
        state, identity = _restore(job, report, allow_change)
        course = Course(job, state, identity, stop, report, state.step or None)
        is_whole = state.step == 0
        _fit(course, has_room=has_room)
        _finish(course)
    if predicted and ranks.is_first:
        has_no_holes = is_dense or job.device.type == "cuda"
        _remember(job, predicted, is_comparable=is_whole and has_no_holes and ranks.is_alone)


def _restore(
    job: Job, report: Reporter, allow_change: Collection[str]
) -> tuple[TrainState, dict[str, str]]:
    """The state to go on from and the identity of the run, after saying that it starts."""
    identity = identity_of(job.run, job.tokenizer, job.dataset)
    job.ranks.check_same(identity, DataError, "base or data")
    state = _resume(job, report, identity, allow_change) if job.ranks.is_first else TrainState()
    state = share_state(state, job.optimizer, job.ranks)
    if state.step and "train.micro_batch_size" not in allow_change:
        job.loader.micro_batch_size = state.micro_batch_size
    return state, identity


def _resume(
    job: Job, report: Reporter, identity: dict[str, str], allow_change: Collection[str]
) -> TrainState:
    run, now = job.run, environment(job.ranks.world_size)
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
    return state


def _fit(course: Course, *, has_room: bool) -> None:
    job, state, stop = course.job, course.state, course.stop
    within = interval_seconds(job.run.train.stop_within, "train.stop_within")
    job.model.train()
    if state.step == 0:
        measure(course)
    if not has_room:
        rehearse(
            job.token_loss,
            job.loader,
            job.steps,
            job.optimizer,
            emit=course.report,
            ranks=job.ranks,
        )
    if state.step:
        stop.standing = f"step {state.step} of {job.steps} is saved"
        if state.is_eval_due and measure(course) and state.is_best:
            save(course)
    while state.step < job.steps:
        with stop.patience(within):
            _step(course)
            if state.is_eval_due:
                measure(course)
            is_asked = stop.asked()
            if state.step == job.steps or is_asked or is_save_due(course):
                save(course)
                is_asked = stop.asked()
        if is_asked:
            job.ranks.end_together()
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
    passes = partial(job.loader.all_batches, state.step)
    job.ranks.draw_own(job.run.train.seed, state.step)
    with nonfinite_reported(job, state.step + 1, passes):
        result = step_within_memory(
            job.token_loss,
            job.loader,
            state.step,
            job.optimizer,
            lr=lr,
            max_grad_norm=optim.max_grad_norm,
            emit=course.report,
            ranks=job.ranks,
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
            peak_memory_bytes=_peak(job),
        )
    )


def _peak(job: Job) -> int:
    """The peak of the rank that has the highest."""
    return int(job.ranks.largest(job.peak.bytes()))


def _finish(course: Course) -> None:
    job, state, report = course.job, course.state, course.report
    fault("train.before_finish")
    course.stop.standing = f"all {job.steps} steps are saved"
    last, peak_memory_bytes = measure(course), _peak(job)
    if not job.ranks.is_first:
        return
    adapter = write_result(job, state, last)
    (job.out / REPORT_FILE).unlink(missing_ok=True)
    weights = sorted(adapter.glob("*.safetensors"))
    report(
        RunEnd(
            reason=folder.FINISHED,
            seconds=state.seconds,
            tokens=state.tokens,
            peak_memory_bytes=peak_memory_bytes,
            predicted_peak_memory_bytes=folder.read_plan(job.out).get("peak_memory_bytes"),
            adapter=str(adapter),
            adapter_bytes=sum(path.stat().st_size for path in weights),
            adapter_sha256={path.name: file_sha256(path) for path in weights},
        )
    )
    report.sync()


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


def _planned(run: RunConfig) -> dict[str, Any]:
    return {k: v for k, v in run.flat().items() if run.origin(k) == "planner"}


def _is_due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
