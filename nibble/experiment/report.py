"""What a comparison found: figures by method with their intervals, differences, an answer.

compare's records -> Report -> report.json, and by `tables` and `page` what a person reads
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from nibble.config import RunConfig
from nibble.experiment.compare import Comparison, Record
from nibble.experiment.criteria import CRITERIA
from nibble.experiment.figures import RunFigures
from nibble.experiment.project import OnDevice
from nibble.experiment.statistics import Estimate, difference, estimate

FORMAT_VERSION = 1
FINISHED, FAILED, TOO_LARGE = "finished", "failed", "does not fit"
# Differences are told between these.
COMPARED = ("eval_loss", "token_accuracy", "exact_match", "forgetting")


@dataclass(frozen=True)
class Method:
    """One method of a comparison.

    Attributes:
        status: finished, failed or does not fit.
        reason: Why it is not finished, and what to do about it.
        num_runs: As many were to be done.
        runs: The finished ones.
        figures: By the key of a criterion.
        own_settings: Keys that it has and no other method, or of other value.
        devices: What a plan says of other GPUs.
    """

    name: str
    status: str
    reason: str
    num_runs: int
    runs: tuple[RunFigures, ...]
    figures: dict[str, Estimate]
    own_settings: dict[str, Any]
    devices: tuple[OnDevice, ...]

    @property
    def smallest(self) -> OnDevice | None:
        """The smallest device of the table that it fits."""
        return next((one for one in self.devices if one.is_smallest), None)

    @property
    def warnings(self) -> dict[str, int]:
        """What it warned of, and in how many runs."""
        found: dict[str, int] = {}
        for run in self.runs:
            for warning in run.warnings:
                found[warning] = found.get(warning, 0) + 1
        return found


@dataclass(frozen=True)
class Difference:
    """A figure of `ours` less that of `theirs` with the same seed; `share` is of their mean."""

    key: str
    ours: str
    theirs: str
    found: Estimate
    share: float


@dataclass(frozen=True)
class Report:
    """A comparison as it was found.

    Attributes:
        settings: What differs from the defaults in every run.
        kernels: What did each kind of operation.
        differs: What the runs were made of or where they ran, where that is not the same.
    """

    run: RunConfig
    seeds: tuple[int, ...]
    methods: tuple[Method, ...]
    differences: tuple[Difference, ...]
    settings: dict[str, Any]
    kernels: dict[str, str]
    num_short: int
    num_general_tokens: int
    differs: tuple[str, ...]

    @property
    def finished(self) -> list[Method]:
        """The methods of which a run is finished."""
        return [method for method in self.methods if method.runs]

    def difference(self, key: str, ours: str, theirs: str) -> Difference | None:
        """One of the differences; those of a method to one before it are told."""
        for found in self.differences:
            if (found.key, found.ours, found.theirs) == (key, ours, theirs):
                return found
        return None


def build_report(
    comparison: Comparison,
    records: Mapping[tuple[str, int], Record],
    runs: Sequence[RunFigures],
    *,
    devices: Sequence[OnDevice] = (),
    kernels: Mapping[str, str] | None = None,
) -> Report:
    """Gather what was measured.

    Args:
        records: How each run ended, by method and seed.
        runs: The figures of the finished ones.
        devices: What a plan says of other GPUs.
        kernels: What did each kind of operation here.
    """
    by_method = {name: [run for run in runs if run.method == name] for name in comparison.runs}
    peaks = {name: _by_seed(found, "peak_memory_bytes") for name, found in by_method.items()}
    common, own = _settings(comparison)
    methods = [
        Method(
            name=name,
            status=_status([r for (m, _), r in records.items() if m == name]),
            reason=_reason([r for (m, _), r in records.items() if m == name]),
            num_runs=comparison.num_seeds,
            runs=tuple(by_method[name]),
            figures={**_figures(by_method[name]), **_cuts(name, peaks)},
            own_settings=own[name],
            devices=tuple(one for one in devices if one.method == name),
        )
        for name in comparison.runs
    ]
    measured = [record.measured for record in records.values() if record.measured]
    return Report(
        run=next(iter(comparison.runs.values())),
        seeds=tuple(comparison.seeds),
        methods=tuple(methods),
        differences=tuple(_differences(by_method)),
        settings=common,
        kernels=dict(kernels or {}),
        num_short=max((found["num_short"] for found in measured), default=0),
        num_general_tokens=max((found["num_general_tokens"] for found in measured), default=0),
        differs=tuple(_differing(runs)),
    )


def to_json(report: Report) -> dict[str, Any]:
    """The report as plain values: methods -> criteria -> value with its interval."""
    return {
        "version": FORMAT_VERSION,
        "model": report.run.model.name,
        "data": report.run.data.train,
        "eval_data": report.run.data.eval,
        "seeds": list(report.seeds),
        "settings": report.settings,
        "kernels": report.kernels,
        "methods": {method.name: _method_to_json(method) for method in report.methods},
        "differences": [
            {
                "criterion": found.key,
                "methods": [found.ours, found.theirs],
                **found.found.to_dict(),
                "share": found.share,
                "is_told_apart": found.found.is_apart_from_0,
            }
            for found in report.differences
        ],
        "differs": list(report.differs),
    }


def _method_to_json(method: Method) -> dict[str, Any]:
    none = {"value": None, "low": None, "high": None}
    smallest = method.smallest
    return {
        "status": {**none, "value": method.status},
        "reason": {**none, "value": method.reason or None},
        "finished_runs": {**none, "value": len(method.runs)},
        **{
            c.key: method.figures[c.key].to_dict() if c.key in method.figures else dict(none)
            for c in CRITERIA
        },
        "settings": {**none, "value": method.own_settings},
        "warnings": {**none, "value": method.warnings},
        "smallest_device": {**none, "value": smallest.device if smallest else None},
        "devices": {
            **none,
            "value": {
                one.device: {
                    "fits": one.fits,
                    "needed_bytes": one.needed_bytes,
                    "step_seconds": one.step_seconds,
                    "total_seconds": one.total_seconds,
                    "cost": one.cost,
                }
                for one in method.devices
            },
        },
    }


def _status(records: Sequence[Record]) -> str:
    if any(record.is_too_large for record in records):
        return TOO_LARGE
    return FAILED if any(record.is_failed for record in records) else FINISHED


def _reason(records: Sequence[Record]) -> str:
    """Of the first run that is not finished."""
    first = next((record for record in records if not record.is_finished), None)
    if first is None:
        return ""
    # A plan's changes are ways out; to start all the same is none in a comparison.
    fix = first.fix.removesuffix("or try it --anyway").removesuffix("; ")
    what = "what would fit" if first.is_too_large else "fix"
    return f"{first.reason} ({what}: {fix})" if fix else first.reason


def _figures(runs: Sequence[RunFigures]) -> dict[str, Estimate]:
    found = {}
    for criterion in CRITERIA:
        estimated = estimate(list(_by_seed(runs, criterion.key).values()))
        if estimated is not None:
            found[criterion.key] = estimated
    return found


def _by_seed(runs: Sequence[RunFigures], key: str) -> dict[int, float]:
    return {run.seed: run.values[key] for run in runs if key in run.values}


def _cuts(name: str, peaks: Mapping[str, Mapping[int, float]]) -> dict[str, Estimate]:
    """The share of memory that a method saves against others, seed by seed."""
    found = {}
    for other in ("lora", "full"):
        theirs = peaks.get(other, {})
        cuts = [1 - peak / theirs[seed] for seed, peak in peaks[name].items() if seed in theirs]
        cut = estimate(cuts)
        if name != other and cut is not None:
            found[f"cut_from_{other}"] = cut
    return found


def _differences(runs: Mapping[str, Sequence[RunFigures]]) -> list[Difference]:
    found = []
    for key in COMPARED:
        for theirs, ours in combinations(runs, 2):
            mine, other = _by_seed(runs[ours], key), _by_seed(runs[theirs], key)
            told = difference(mine, other)
            if told is None:
                continue
            mean = sum(other[seed] for seed in other if seed in mine) / told.num_values
            share = told.value / abs(mean) if mean else 0.0
            found.append(Difference(key, ours, theirs, told, share))
    return found


def _settings(comparison: Comparison) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What differs from the defaults in all runs, and by method what is its own."""
    defaults = RunConfig().flat()
    beside = ("method", "out", "model.name", "data.train", "data.eval", "train.seed")
    changed = {
        name: {k: v for k, v in run.flat().items() if v != defaults[k] and k not in beside}
        for name, run in comparison.runs.items()
    }
    first = next(iter(changed.values()))
    common = {k: v for k, v in first.items() if all(x.get(k) == v for x in changed.values())}
    own = {
        name: {k: v for k, v in found.items() if k not in common} for name, found in changed.items()
    }
    return common, own


def _differing(runs: Sequence[RunFigures]) -> list[str]:
    """Names of what is not the same in all runs, though it should be."""
    names = dict.fromkeys(name for run in runs for name in run.made_of)
    return [name for name in names if len({run.made_of.get(name) for run in runs}) > 1]
