"""train(run, emit): build, loop, finish."""

import hashlib
import json
import math
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from nibble.adapter.format import write_adapter
from nibble.config import RunConfig, interval_seconds
from nibble.data.dataset import Dataset
from nibble.data.loader import eval_batches
from nibble.errors import RunInterrupted, StoppedError, UsageError
from nibble.events import (
    CheckpointSaved,
    Emit,
    EvalEnd,
    EventLog,
    MetricsTable,
    PagesMoved,
    PlanMade,
    RunEnd,
    RunStart,
    StepEnd,
    read_events,
)
from nibble.train import checkpoint, folder, history
from nibble.train.card import run_card
from nibble.train.checkpoint import TrainState
from nibble.train.evaluate import EVAL_TOKENS, evaluate
from nibble.train.interrupt import StopSignal
from nibble.train.job import Job, build_job, check_run, open_keys
from nibble.train.manifest import write_manifest
from nibble.train.memory import available_bytes, keep_heap_dense
from nibble.train.optimizer import learning_rate
from nibble.train.paging import PagedMoments
from nibble.train.pressure import out_of_memory_named, rehearse, step_within_memory

# Up to this share of the free memory the holes of the heap fit beside the tensors.
ROOMY_SHARE = 0.4


@dataclass(frozen=True)
class Result:
    """What a finished run leaves.

    Args:
        out: The run folder.
        adapter: The adapter folder; of a full fine-tune, the folder of the whole model.
        final_loss: Training loss of the last step, in nats per target token.
        eval_loss: Held-out loss after training; None without held-out data.
        peak_memory_bytes: See `PeakMemory`.
        tokens_per_s: Tokens trained over the time of the steps.
    """

    out: Path
    adapter: Path
    final_loss: float
    eval_loss: float | None
    peak_memory_bytes: int
    tokens_per_s: float


def train(
    run: RunConfig,
    emit: Emit = lambda event: None,
    *,
    plan: Mapping[str, Any] | None = None,
    dataset: Dataset | None = None,
) -> Result:
    """Train as `run` says, or continue what stands in its folder.

    Args:
        run: Concrete values; `nibble.train` resolves `auto` first.
        emit: Receives every event, in order.
        plan: What was planned, as `Plan.to_dict` gives it; recorded in the run folder.
        dataset: The rows where they were read already.

    Raises:
        NibbleError: One of its kinds, each with an exit code; see `nibble.errors`.
    """
    check_run(run)
    if open_keys(run):
        raise UsageError(f"{', '.join(open_keys(run))}: auto must be planned first")
    with folder.run_folder(run) as out:
        if folder.is_finished(out):
            return _result_of(out)
        log, table = EventLog(out / folder.EVENTS_FILE), MetricsTable(out / folder.METRICS_FILE)

        def emit_all(event: Any) -> None:
            for receive in (log, table, emit):
                receive(event)

        try:
            predicted = folder.record_plan(out, plan)
            has_room = _has_room(predicted)
            is_dense = bool(predicted) and not has_room and keep_heap_dense()
            with out_of_memory_named(run, predicted), StopSignal() as stop:
                emit_all(PlanMade(_planned(run), list(predicted.get("reasons", ()))))
                job = build_job(run, out, emit_all, dataset)
                state = _restore(job, emit_all)
                is_whole = state.step == 0
                _fit(job, state, stop, emit_all, has_room=has_room)
                _finish(job, state, emit_all)
            if predicted:
                has_no_holes = is_dense or job.device.type == "cuda"
                _remember(job, predicted, is_comparable=is_whole and has_no_holes)
        finally:
            log.close()
        return _result_of(out)


def _has_room(plan: Mapping[str, Any]) -> bool:
    """Whether a run was planned and needs so little of the free memory that it cannot run short."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return bool(plan) and plan["peak_memory_bytes"] <= ROOMY_SHARE * available_bytes(device)


def _restore(job: Job, emit: Emit) -> TrainState:
    """The state to go on from, after saying that the run starts."""
    state = checkpoint.restore(_checkpoints(job), job.optimizer, identity=_identity(job.run))
    state = state or TrainState()
    folder.forget_metrics_after(job.out, state.step if state.step else -1)
    write_manifest(job.out, job.run)
    emit(
        RunStart(
            method=job.run.method,
            model=job.run.model.name,
            device=str(job.device),
            steps=job.steps,
            steps_done=state.step,
            num_train_rows=len(job.dataset.train),
            num_eval_rows=len(job.dataset.eval),
            versions={"python": platform.python_version(), "torch": torch.__version__},
            num_threads=torch.get_num_threads(),
        )
    )
    if state.step == 0:
        _evaluate(job, 0, emit)
    return state


def _fit(job: Job, state: TrainState, stop: StopSignal, emit: Emit, *, has_room: bool) -> None:
    run = job.run
    job.model.train()
    if not has_room:
        rehearse(job.token_loss, job.loader, job.steps, job.optimizer, emit=emit)
    saved_at = time.monotonic()
    while state.step < job.steps:
        lr = learning_rate(
            state.step,
            steps=job.steps,
            peak=run.optim.lr,
            warmup=run.optim.warmup,
            schedule=run.optim.schedule,
        )
        start = time.monotonic()
        result = step_within_memory(
            job.token_loss,
            job.loader,
            state.step,
            job.optimizer,
            lr=lr,
            max_grad_norm=run.optim.max_grad_norm,
            emit=emit,
        )
        seconds = time.monotonic() - start
        state.step += 1
        state.tokens += result.tokens
        state.seconds += seconds
        emit(
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
        if _is_due(run.train.eval_every, state.step) and state.step < job.steps:
            _evaluate(job, state.step, emit)
        is_last = state.step == job.steps
        if is_last or stop.name or _must_save(run.train.save_every, state.step, saved_at):
            _save(job, state, emit)
            saved_at = time.monotonic()
        if stop.name and not is_last:
            _stop(job, state, stop.name, emit)


def _finish(job: Job, state: TrainState, emit: Emit) -> None:
    last = _evaluate(job, state.step, emit)
    adapter = _write_result(job, state, last)
    emit(
        RunEnd(
            reason=folder.FINISHED,
            seconds=state.seconds,
            tokens=state.tokens,
            peak_memory_bytes=job.peak.bytes(),
            predicted_peak_memory_bytes=folder.read_plan(job.out).get("peak_memory_bytes"),
            adapter=str(adapter),
            adapter_bytes=sum(p.stat().st_size for p in adapter.glob("*.safetensors")),
        )
    )


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


def _write_result(job: Job, state: TrainState, last: EvalEnd | None) -> Path:
    run = job.run
    if run.method == "full":
        target = job.out / "model"
        # The last checkpoint stands: what it holds need not stay beside the copy in 16 bits.
        job.optimizer.release()
        disable_progress_bar()
        job.model.to(torch.bfloat16).save_pretrained(target)
        job.tokenizer.save_pretrained(target)
        return target
    return write_adapter(
        job.model,
        job.out / "adapter",
        tokenizer=job.tokenizer,
        base=run.model.name,
        revision=run.model.revision,
        card=run_card(run, state, last),
    )


def _evaluate(job: Job, step: int, emit: Emit) -> EvalEnd | None:
    if not job.dataset.eval:
        return None
    end = evaluate(
        job.model,
        eval_batches(job.dataset.eval, max_tokens=EVAL_TOKENS),
        step=step,
        autocast=job.autocast,
        device=job.device,
    )
    emit(end)
    return end


def _save(job: Job, state: TrainState, emit: Emit) -> None:
    start = time.monotonic()
    saved = checkpoint.save(_checkpoints(job), state, job.optimizer, identity=_identity(job.run))
    emit(CheckpointSaved(state.step, str(saved), time.monotonic() - start))
    moments = job.optimizer.moments
    if isinstance(moments, PagedMoments):
        emit(
            PagesMoved(
                state.step,
                pages_in=moments.pages_in,
                pages_out=moments.pages_out,
                bytes_moved=moments.bytes_moved,
                stall_seconds=moments.stall_seconds,
            )
        )


def _stop(job: Job, state: TrainState, signal_name: str, emit: Emit) -> None:
    """Say why the run ends here; its checkpoint stands already."""
    emit(RunEnd(f"stopped by {signal_name}", state.seconds, state.tokens, job.peak.bytes()))
    kind = RunInterrupted if signal_name == "SIGINT" else StoppedError
    raise kind(
        f"stopped by {signal_name} after step {state.step} of {job.steps}; it is saved",
        fix=f"run the same command again to continue ({job.out})",
    )


def _result_of(out: Path) -> Result:
    """Read the result off the event log."""
    final_loss, eval_loss, tokens, seconds = math.nan, None, 0, 0.0
    for event in read_events(out / folder.EVENTS_FILE):
        if isinstance(event, StepEnd):
            final_loss = event.loss
        elif isinstance(event, EvalEnd):
            eval_loss = event.loss
    end = folder.last_end(out)
    if end is not None:
        tokens, seconds = end.tokens, end.seconds
    return Result(
        out=out,
        adapter=Path(end.adapter) if end else out / "adapter",
        final_loss=final_loss,
        eval_loss=eval_loss,
        peak_memory_bytes=end.peak_memory_bytes if end else 0,
        tokens_per_s=tokens / max(seconds, 1e-9),
    )


def _planned(run: RunConfig) -> dict[str, Any]:
    return {k: v for k, v in run.flat().items() if run.origin(k) == "planner"}


def _identity(run: RunConfig) -> str:
    """A digest of every value that decides the course of a run."""
    values = {key: value for key, value in run.flat().items() if key != "out"}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _checkpoints(job: Job) -> Path:
    return job.out / folder.CHECKPOINTS


def _is_due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


def _must_save(every: int | str, step: int, saved_at: float) -> bool:
    if isinstance(every, int):
        return step % every == 0
    return time.monotonic() - saved_at >= interval_seconds(every, "train.save_every")
