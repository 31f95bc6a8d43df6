"""train(run, emit): build, loop, finish."""

import math
import platform
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nibble.adapter.format import write_adapter
from nibble.config import RunConfig
from nibble.data.dataset import Dataset, build_dataset
from nibble.data.loader import Loader, eval_batches
from nibble.errors import OutOfMemoryError, RunInterrupted, StoppedError, UsageError
from nibble.events import (
    CheckpointSaved,
    Emit,
    EvalEnd,
    EventLog,
    LoadEnd,
    MetricsTable,
    PlanMade,
    RunEnd,
    RunStart,
    StepEnd,
    WarningRaised,
)
from nibble.model.adapt import adapt
from nibble.model.ledger import count_parameters, resident_bytes
from nibble.model.load import load_base
from nibble.model.recompute import apply_recompute
from nibble.train import checkpoint, folder
from nibble.train.card import run_card
from nibble.train.checkpoint import TrainState
from nibble.train.evaluate import evaluate
from nibble.train.loss import token_loss
from nibble.train.manifest import write_manifest
from nibble.train.memory import PeakMemory
from nibble.train.optimizer import AdamW, learning_rate, parameter_groups
from nibble.train.step import train_step

EVAL_TOKENS = 4096


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


@dataclass
class Job:
    """The parts of a run, built and ready."""

    run: RunConfig
    out: Path
    model: Any
    tokenizer: Any
    dataset: Dataset
    loader: Loader
    optimizer: AdamW
    device: torch.device
    autocast: torch.dtype | None
    peak: PeakMemory
    steps: int


def train(
    run: RunConfig, emit: Emit = lambda event: None, *, reasons: Sequence[str] = ()
) -> Result:
    """Train as `run` says, or continue what stands in its folder.

    Args:
        run: Concrete values; `nibble.train` resolves `auto` first.
        emit: Receives every event, in order.
        reasons: Why the planner chose what it chose, for the log.

    Raises:
        NibbleError: One of its kinds, each with an exit code; see `nibble.errors`.
    """
    _check(run)
    with folder.run_folder(run) as out:
        if folder.is_finished(out):
            return _result_of(out)
        log, table = EventLog(out / folder.EVENTS_FILE), MetricsTable(out / folder.METRICS_FILE)

        def emit_all(event: Any) -> None:
            for receive in (log, table, emit):
                receive(event)

        try:
            with _out_of_memory_named(), _StopSignal() as stop:
                emit_all(PlanMade(_planned(run), list(reasons)))
                job = _build(run, out, emit_all)
                state = _restore(job, emit_all)
                _fit(job, state, stop, emit_all)
                _finish(job, state, emit_all)
        finally:
            log.close()
        return _result_of(out)


def _build(run: RunConfig, out: Path, emit: Emit) -> Job:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(run.train.seed)
    peak = PeakMemory(device)
    start = time.monotonic()
    model, tokenizer = _load(run, device)
    if run.method != "full":
        adapt(
            model,
            **run.lora.model_dump(exclude={"dtype"}),
            dtype=getattr(torch, run.lora.dtype),
            generator=torch.Generator().manual_seed(run.train.seed),
        )
    seconds = time.monotonic() - start
    dataset = build_dataset(run.data, tokenizer, seed=run.train.seed)
    for warning in dataset.warnings:
        emit(WarningRaised(warning))
    loader = Loader(
        dataset.train,
        batch_size=run.train.batch_size,
        micro_batch_size=int(run.train.micro_batch_size),
        seed=run.train.seed,
    )
    apply_recompute(model, run.train.recompute)
    groups = parameter_groups(model, lora_plus_ratio=run.optim.lora_plus_ratio)
    optimizer = AdamW(groups, weight_decay=run.optim.weight_decay)
    resident = resident_bytes(model)
    num_trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    emit(
        LoadEnd(
            resident_bytes=resident,
            total_bytes=sum(resident.values()),
            num_trainable=num_trainable,
            num_total=count_parameters(model),
            seconds=seconds,
        )
    )
    steps = run.train.steps or math.ceil(run.train.epochs * loader.steps_per_epoch)
    is_mixed = run.method == "full" and run.model.dtype == "bfloat16"
    autocast = torch.bfloat16 if is_mixed else None
    return Job(
        run=run,
        out=out,
        model=model,
        tokenizer=tokenizer,
        dataset=dataset,
        loader=loader,
        optimizer=optimizer,
        device=device,
        autocast=autocast,
        peak=peak,
        steps=steps,
    )


def _load(run: RunConfig, device: torch.device) -> tuple[Any, Any]:
    is_float32 = run.model.dtype == "float32"
    is_full = run.method == "full"
    storage = "float32" if is_full or is_float32 else "bf16"
    if run.method == "qlora":
        storage = run.quant.type
    return load_base(
        run.model.name,
        storage,
        revision=run.model.revision,
        dtype=torch.float32 if is_full or is_float32 else torch.bfloat16,
        quant=run.quant.model_dump(exclude={"type"}),
        trainable=is_full,
        device=device,
    )


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


def _fit(job: Job, state: TrainState, stop: "_StopSignal", emit: Emit) -> None:
    run = job.run
    job.model.train()
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
        batches = [batch.to(job.device) for batch in job.loader.micro_batches(state.step)]
        result = train_step(
            lambda batch: token_loss(job.model, batch, autocast=job.autocast),
            batches,
            job.optimizer,
            lr=lr,
            max_grad_norm=run.optim.max_grad_norm,
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
            adapter=str(adapter),
            adapter_bytes=sum(p.stat().st_size for p in adapter.glob("*.safetensors")),
        )
    )


def _write_result(job: Job, state: TrainState, last: EvalEnd | None) -> Path:
    run = job.run
    if run.method == "full":
        target = job.out / "model"
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
    saved = checkpoint.save(
        _checkpoints(job), state, job.optimizer, identity=_identity(job.run)
    )
    emit(CheckpointSaved(state.step, str(saved), time.monotonic() - start))


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
    for event in folder.read_events(out / folder.EVENTS_FILE):
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


def _check(run: RunConfig) -> None:
    """Refuse what is missing or not available before anything is loaded."""
    autos = [key for key, value in run.flat().items() if value == "auto" and key != "data.format"]
    if autos:
        raise UsageError(f"{', '.join(autos)}: auto must be resolved first", fix="nibble.train")
    for key in ("model.name", "data.train"):
        if not run.flat()[key]:
            flag = {"model.name": "--model", "data.train": "--data"}[key]
            raise UsageError(f"{key} is not set", fix=f"give {flag} or set it in the recipe")
    absent = {
        "optim.name": ("adamw8bit", "adamw"),
        "optim.paged": (True, "false"),
        "train.exactness": ("exact", "default"),
    }
    for key, (value, instead) in absent.items():
        if run.flat()[key] == value:
            raise UsageError(
                f"{key}={value} is not available in this version", fix=f"use {key}={instead}"
            )


def _planned(run: RunConfig) -> dict[str, Any]:
    return {k: v for k, v in run.flat().items() if run.origin(k) == "planner"}


def _identity(run: RunConfig) -> str:
    return str(hash_of_run(run))


def hash_of_run(run: RunConfig) -> str:
    """A digest of every value that decides the course of a run."""
    import hashlib
    import json

    values = {key: value for key, value in run.flat().items() if key != "out"}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _checkpoints(job: Job) -> Path:
    return job.out / "checkpoints"


def _is_due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


def _must_save(every: int | str, step: int, saved_at: float) -> bool:
    if isinstance(every, int):
        return step % every == 0
    number, unit = every.rstrip("smhin"), every.lstrip("0123456789")
    return time.monotonic() - saved_at >= int(number) * {"s": 1, "min": 60, "h": 3600}[unit]


class _StopSignal:
    """Remembers the first SIGINT, SIGTERM or SIGUSR1; the loop asks after every step."""

    def __init__(self) -> None:
        self.name = ""
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "_StopSignal":
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            try:
                self._previous[number] = signal.signal(number, self._remember)
            except ValueError:  # not the main thread: the caller handles signals
                return self
        return self

    def __exit__(self, *details: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: object) -> None:
        if self.name:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name


@contextmanager
def _out_of_memory_named() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(
            f"the device ran out of memory: {str(error).splitlines()[0]}",
            fix="lower train.micro_batch_size or data.max_seq_len, set train.recompute=full, "
            "or use method=qlora",
        ) from None
