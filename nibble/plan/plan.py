"""A plan: what a run would need on a device, what was chosen, and why.

config, model, data, device -> rows -> advice -> Plan
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from nibble.config import RunConfig, interval_seconds
from nibble.data.dataset import Dataset, build_dataset
from nibble.errors import (
    DoesNotFitError,
    UnavailableError,
    UsageError,
    did_you_mean,
)
from nibble.model.families import family_of
from nibble.model.files import find_config
from nibble.model.skeleton import build_config
from nibble.model.tokenizer import load_tokenizer
from nibble.plan.advise import Choice, Question, advise, pace
from nibble.plan.budget import CONTEXT_BYTES
from nibble.plan.devices import Device, find_device, with_measured_rates
from nibble.plan.estimate import cost
from nibble.plan.forecast import CORRECTION, Forecast
from nibble.plan.presets import preset_config, preset_names, preset_short_names
from nibble.plan.rows import Rows, full_rows, rows_of
from nibble.plan.tracker import MOST_EXPERTS
from nibble.plan.watch import ADAPTERS, BASE_4BIT, BASE_DENSE, GRADIENTS, MOMENTS
from nibble.train.checkpoint import most_at_once
from nibble.train.history import read_history, summary
from nibble.train.memory import available_bytes


@dataclass(frozen=True)
class RunnerUp:
    """The best way of the other method: what it would cost, or save."""

    method: str
    settings: dict[str, Any]
    fits: bool
    peak_memory_bytes: int
    step_seconds: float | None
    difference: str


@dataclass(frozen=True)
class DataSummary:
    """What the user's examples are like: lengths in tokens.

    `num_by_length` counts documents by the power of two their length is below; `share_cut` is the
    share of documents longer than a cut-off, by cut-off.
    """

    num_rows: int
    num_documents: int
    num_tokens: int
    packing_efficiency: float
    longest_pass_tokens: int
    num_by_length: dict[int, int]
    share_cut: dict[int, float]


@dataclass(frozen=True)
class Plan:
    """What a run would need, and the settings that were chosen.

    Args:
        peak_memory_bytes: The highest phase, with the workspace of libraries, corrected by what
            past runs on the device took.
        uncorrected_peak_memory_bytes: The same without that correction.
        needed_bytes: The peak with the margin for holes between tensors: what has to fit.
        budget_bytes: What one device has for the run.
        phases: Peak bytes of each phase.
        parts: What the bytes at the peak are for.
        host_memory_bytes: Pages and checkpoints that wait in host memory.
        step_seconds: Of an optimizer step; None where the device's rates are unknown.
        total_seconds: Of all steps; None where their number or the rates are unknown.
        cost: Of the run at the price given; None without one.
        disk_bytes: Checkpoints and adapter.
        changes: Where nothing fits: what would, smallest change first.
    """

    model: str
    device: str
    method: str
    fits: bool
    peak_memory_bytes: int
    uncorrected_peak_memory_bytes: int
    needed_bytes: int
    budget_bytes: int
    phases: dict[str, int]
    parts: dict[str, int]
    host_memory_bytes: int
    settings: dict[str, Any]
    step_seconds: float | None
    total_seconds: float | None
    cost: float | None
    disk_bytes: int
    num_trainable: int
    num_total: int
    reasons: list[str]
    runner_up: RunnerUp | None = None
    changes: list[str] = field(default_factory=list)
    data: DataSummary | None = None

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values."""
        return asdict(self)

    def fits_in_shards(self, count: int) -> bool:
        """Whether the run fits on each of `count` devices that keep a part of the layers each.

        The layers that are whole while they work are not counted.
        """
        layers = sum(self.parts.get(part, 0) for part in (BASE_4BIT, BASE_DENSE))
        return self.needed_bytes - (1 - 1 / count) * layers <= self.budget_bytes

    def error(self) -> DoesNotFitError:
        """What a run that does not fit is refused with."""
        return DoesNotFitError(
            " ".join(self.reasons), fix="; or ".join(self.changes) + "; or try it --anyway"
        )


@dataclass(frozen=True)
class Charge:
    """What a device costs: per hour, in units of `billing`.

    Raises:
        UsageError: If the price is negative or no number, or `billing` is no time.
    """

    price_per_hour: float | None = None
    billing: str = "1s"

    def __post_init__(self) -> None:
        interval_seconds(self.billing, "--billing")
        price = self.price_per_hour
        if price is not None and not (math.isfinite(price) and price >= 0):
            raise UsageError(f"a price of {price} is none", fix="give USD per hour, such as 2.31")


def make_plan(
    run: RunConfig, device: Device | str = "here", *, charge: Charge | None = None
) -> tuple[Plan, Dataset | None]:
    """Plan a run, and give the data set that was read for it.

    Args:
        run: The run; what is `auto` in it is chosen.
        device: A device, its name, an amount of memory such as "24GiB", "cpu" or "here".
        charge: Prices; None takes the example price of the device.

    Raises:
        UsageError: If the model or the device is unknown.
        ModelError: If the model's config is broken.
        DataError: If the data cannot be used.
    """
    device = find_device(device) if isinstance(device, str) else device
    device = with_measured_rates(_available(device))
    values = model_values(run)
    dataset = _read_data(run)
    rows = rows_of(dataset, run) if dataset else full_rows(run)
    correction = summary(read_history()).get(device.name, 1.0)
    question = Question(run, values, rows, device, correction)
    choice = advise(question)
    plan = _plan(question, choice, charge or Charge(device.price_per_hour))
    notes = list(_notes(question, has_data=dataset is not None))
    if charge is not None and plan.cost is None:
        notes.append("No cost: it takes a device of known rates and price, and a number of steps.")
    plan = replace(plan, reasons=[*plan.reasons, *notes])
    if dataset is not None:
        plan = replace(plan, data=_summary(dataset, rows, choice, run))
    return plan, dataset


def _notes(question: Question, *, has_data: bool) -> Iterator[str]:
    """What a person should know of how the plan was made."""
    if question.correction != 1.0:
        yield f"Learned correction: past runs here took {question.correction:.2f} times their plan."
    config = build_config(question.values)
    if not family_of(config).is_first_class:
        yield (
            f"{config.model_type} is not among the tested architectures: the plan assumes that its "
            "layers run as transformers defines them."
        )
    if getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None):
        yield f"Tokens are taken to spread evenly over up to {MOST_EXPERTS} experts."
    most, length = getattr(config, "max_position_embeddings", None), question.run.data.max_seq_len
    if most and length > most:
        yield f"The model knows {most:,} positions and rows may have {length:,} tokens."
    if question.run.data.train and not has_data:
        yield "The data was not read: that needs the folder of the model with its tokenizer."
    if question.device.count > 1:
        count = question.device.count
        yield (
            f"The plan is of one device; {count} runs can go side by side on {count}, or one on "
            f"all: `nibble train --devices {count}`."
        )


def model_values(run: RunConfig) -> dict[str, Any]:
    """config.json of the model: of its folder, of a preset, or of the hub.

    Raises:
        UsageError: If there is no such model.
        ModelError: If its config is broken.
        UnavailableError: If the hub cannot be reached.
    """
    name = run.model.name
    if not Path(name).expanduser().is_dir():
        known = preset_config(name)
        if known is not None:
            return known
        close = did_you_mean(name, preset_short_names())
        if close and "/" not in name:
            raise UsageError(f"model {name!r} is no folder and no preset", fix=close)
    try:
        return find_config(name, run.model.revision)
    except (UsageError, UnavailableError) as error:
        close = did_you_mean(name, [*preset_names(), *preset_short_names()])
        raise type(error)(error.what, fix=close or error.fix) from None


def _available(device: Device) -> Device:
    """The device with what is free of its memory and its host's, where it is in this machine."""
    if device.host_memory_bytes is None:
        return device
    import torch

    free = available_bytes(torch.device(device.type))
    return replace(
        device,
        # What this process holds on the device already is part of the budget.
        memory_bytes=free
        if device.type == "cpu"
        else min(device.memory_bytes, free + CONTEXT_BYTES),
        host_memory_bytes=available_bytes(torch.device("cpu")),
    )


def _read_data(run: RunConfig) -> Dataset | None:
    folder = Path(run.model.name).expanduser()
    if not run.data.train or not folder.is_dir():
        return None
    return build_dataset(run.data, load_tokenizer(folder), seed=run.train.seed)


def _plan(question: Question, choice: Choice, charge: Charge) -> Plan:
    device, rows, forecast = question.device, question.rows, choice.forecast
    step_seconds = forecast.step_seconds if question.is_timed else None
    total = step_seconds * rows.num_steps if step_seconds and rows.num_steps else None
    price = charge.price_per_hour
    return Plan(
        model=question.run.model.name,
        device=device.name,
        method=forecast.option.method,
        fits=choice.fits,
        peak_memory_bytes=forecast.peak_bytes,
        uncorrected_peak_memory_bytes=forecast.peak_bytes - forecast.peak.parts[CORRECTION],
        needed_bytes=forecast.needed_bytes,
        budget_bytes=question.budget,
        phases={name: peak.bytes for name, peak in forecast.phases.items()},
        parts={part: size for part, size in forecast.peak.parts.items() if size},
        host_memory_bytes=forecast.host_bytes,
        settings=forecast.option.settings(),
        step_seconds=step_seconds,
        total_seconds=total,
        cost=cost(total, price, charge.billing) if total and price is not None else None,
        disk_bytes=_disk_bytes(forecast, has_eval=question.run.data.eval is not None),
        num_trainable=forecast.num_trainable,
        num_total=forecast.num_total,
        reasons=list(choice.reasons),
        runner_up=_runner_up(question, choice.forecast, choice.runner_up)
        if choice.runner_up
        else None,
        changes=list(choice.changes),
    )


def _runner_up(question: Question, chosen: Forecast, other: Forecast) -> RunnerUp:
    bytes_more = other.peak_bytes - chosen.peak_bytes
    memory = f"{abs(bytes_more) / 1e9:.1f} GB {'more' if bytes_more > 0 else 'less'} memory"
    fits = question.fits(other)
    return RunnerUp(
        method=other.option.method,
        settings=other.option.settings(),
        fits=fits,
        peak_memory_bytes=other.peak_bytes,
        step_seconds=other.step_seconds if question.is_timed else None,
        difference=f"{memory}, {pace(question, other, chosen) if fits else 'it does not fit'}",
    )


def _disk_bytes(forecast: Forecast, *, has_eval: bool) -> int:
    """The checkpoints that stand at the same time, and the adapter or the whole model."""
    parts = forecast.phases["optimizer"].parts
    state = parts.get(MOMENTS, 0) + forecast.paged_bytes
    trained = parts.get(ADAPTERS, 0) or parts.get(GRADIENTS, 0)
    # A whole model is written in 16 bits.
    result = trained // 2 if forecast.option.method == "full" else trained
    return most_at_once(has_eval=has_eval) * (state + trained) + result


def _summary(dataset: Dataset, rows: Rows, choice: Choice, run: RunConfig) -> DataSummary:
    lengths = [length for row in dataset.train for length in row.doc_lens]
    by_length: dict[int, int] = {}
    for length in sorted(lengths):
        edge = 2 ** length.bit_length()
        by_length[edge] = by_length.get(edge, 0) + 1
    cut_offs = [edge for edge in (256, 512, 1024, 2048, 4096, 8192) if edge < run.data.max_seq_len]
    report = dataset.report.train
    share_cut = {edge: sum(n > edge for n in lengths) / len(lengths) for edge in cut_offs}
    num_dropped = report.num_dropped_long + report.num_dropped_without_target
    num_long = report.num_truncated + report.num_dropped_long
    share_cut[run.data.max_seq_len] = num_long / max(1, report.num_documents + num_dropped)
    size = choice.forecast.option.micro_batch_size
    return DataSummary(
        num_rows=report.num_rows,
        num_documents=report.num_documents,
        num_tokens=report.num_tokens,
        packing_efficiency=report.packing_efficiency,
        longest_pass_tokens=sum(rows.worst[size]),
        num_by_length=by_length,
        share_cut=share_cut,
    )


def concrete(run: RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    """The run with the plan's settings where it left them open."""
    flat = run.flat()
    chosen = {
        key: value
        for key, value in settings.items()
        if flat[key] == "auto" or (flat[key] != value and run.origin(key) == "default")
    }
    return run.with_values(chosen, "planner")
