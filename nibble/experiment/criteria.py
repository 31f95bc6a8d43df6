"""The six criteria: what stands in a report, in which order, and how a figure is written."""

from dataclasses import dataclass
from typing import Literal

from nibble.experiment.statistics import Estimate
from nibble.units import size

Unit = Literal["bytes", "seconds", "rate", "nats", "share", "cut", "count"]


@dataclass(frozen=True)
class Criterion:
    """One figure of a method.

    Attributes:
        key: In report.json, and of `RunFigures.values`.
        group: Which of the six criteria it belongs to.
        title: For a person.
        unit: How it is written.
    """

    key: str
    group: str
    title: str
    unit: Unit


_SIZE, _TIME, _MEMORY, _QUALITY = "Model size", "Training time", "Memory", "Performance"
GROUPS = (_SIZE, _TIME, _MEMORY, _QUALITY, "Setting up", "Hardware")

CRITERIA = (
    Criterion("base_bytes", _SIZE, "resident base", "bytes"),
    Criterion("saved_bytes", _SIZE, "saved result", "bytes"),
    Criterion("saved_share", _SIZE, "saved result over base", "share"),
    Criterion("trained_values", _SIZE, "trained values", "count"),
    Criterion("setup_seconds", _TIME, "set-up: load, store, adapt", "seconds"),
    Criterion("step_seconds", _TIME, "per step, median", "seconds"),
    Criterion("train_seconds", _TIME, "all steps", "seconds"),
    Criterion("total_seconds", _TIME, "whole process", "seconds"),
    Criterion("tokens_per_s", _TIME, "tokens per second", "rate"),
    Criterion("peak_memory_bytes", _MEMORY, "peak, measured", "bytes"),
    Criterion("predicted_peak_memory_bytes", _MEMORY, "peak, predicted", "bytes"),
    Criterion("cut_from_lora", _MEMORY, "measured, beside lora", "cut"),
    Criterion("cut_from_full", _MEMORY, "measured, beside full", "cut"),
    Criterion("eval_loss_before", _QUALITY, "held-out loss before", "nats"),
    Criterion("eval_loss", _QUALITY, "held-out loss after", "nats"),
    Criterion("token_accuracy_before", _QUALITY, "token accuracy before", "share"),
    Criterion("token_accuracy", _QUALITY, "token accuracy after", "share"),
    Criterion("exact_match", _QUALITY, "short answers right", "share"),
    Criterion("general_loss_before", _QUALITY, "loss on general text before", "nats"),
    Criterion("general_loss", _QUALITY, "loss on general text after", "nats"),
    Criterion("forgetting", _QUALITY, "forgetting: after - before", "nats"),
)
BY_KEY = {criterion.key: criterion for criterion in CRITERIA}


def written(estimate: Estimate | None, unit: Unit) -> str:
    """A mean and, where it is not 0 as written, half of its interval.

    >>> written(Estimate(3.6328, 3.6286, 3.6370, 3), "nats")
    '3.6328 ± 0.0042'
    >>> written(Estimate(1536, 1436, 1636, 3), "bytes")
    '1.5 KiB ± 0.1 KiB'
    >>> written(Estimate(16.2, 9.1, 23.3, 3), "seconds")
    '16 s ± 7 s'
    >>> written(None, "bytes")
    '-'
    """
    if estimate is None:
        return "-"
    if unit == "cut":
        cut = plain(abs(estimate.value), "share")
        return f"{cut} {'less' if estimate.value > 0 else 'more'}"
    value, half = plain(estimate.value, unit), estimate.half_width
    if half is None:
        return value
    spread = plain(half, unit, beside=estimate.value)
    none = plain(0.0, unit, beside=estimate.value)
    return value if spread == none else f"{value} ± {spread}"


def plain(value: float, unit: Unit, *, beside: float | None = None) -> str:
    """A figure with its unit, to the digits of another where it stands beside that.

    >>> plain(0.4187, "seconds"), plain(754.2, "seconds"), plain(0.314, "share")
    ('0.419 s', '754 s', '31.4 %')
    """
    if unit == "bytes":
        return size(value, beside)
    if unit == "seconds":
        is_short = abs(value if beside is None else beside) < 10
        return f"{value:.3f} s" if is_short else f"{value:,.0f} s"
    if unit == "nats":
        return f"{value:.4f}"
    if unit in ("share", "cut"):
        return f"{100 * value:.1f} %"
    return f"{value:,.0f}"
