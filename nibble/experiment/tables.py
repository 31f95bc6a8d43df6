"""The tables and sentences of a report, for terminal, Markdown and HTML alike."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nibble.experiment.criteria import BY_KEY, CRITERIA, GROUPS, written
from nibble.experiment.measure import SHORT_TOKENS
from nibble.experiment.project import OnDevice
from nibble.experiment.report import FINISHED, Difference, Method, Report
from nibble.experiment.verdict import beside_lora, verdict
from nibble.units import counted, size

# Runs of one method that differ more than so many times in speed had different machines.
UNEVEN = 1.25


@dataclass(frozen=True)
class Table:
    """A heading, names of columns, rows whose first cell names them, and how to read them."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    about: str = ""


@dataclass(frozen=True)
class Page:
    """A report as a person reads it, from top to bottom.

    Attributes:
        answer: Sentences of one paragraph.
        summary: A row for each of the six criteria; its columns are the methods.
        groups: A table for each of the six criteria; their columns are the methods.
        others: Tables with columns of their own.
        notes: What a reader should know of the figures.
    """

    title: str
    facts: tuple[tuple[str, str], ...]
    answer: tuple[str, ...]
    summary: Table
    groups: tuple[Table, ...]
    others: tuple[Table, ...]
    notes: tuple[str, ...]


def build_page(report: Report) -> Page:
    """Everything a report says."""
    names = tuple(method.name for method in report.methods)
    outcome = Table("Runs", ("", *names), tuple(_outcome_rows(report)))
    groups = [Table(group, ("", *names), tuple(_rows(report, group))) for group in GROUPS]
    return Page(
        title=f"{', '.join(names)} on the same work",
        facts=tuple(_facts(report)),
        answer=tuple(verdict(report)),
        summary=Table("In six rows", ("", *names), tuple(_six_rows(report))),
        groups=(outcome, *(group for group in groups if group.rows)),
        others=tuple(_other_tables(report)),
        notes=tuple(_notes(report)),
    )


def _facts(report: Report) -> Iterator[tuple[str, str]]:
    data = report.run.data
    train = data.train if isinstance(data.train, list) else [data.train]
    held_out = data.eval if isinstance(data.eval, str) else f"{data.eval:.0%} of the rows, by seed"
    yield "model", report.run.model.name
    yield "training data", ", ".join(train)
    yield "held-out data", held_out
    started = next((run.start for method in report.methods for run in method.runs), None)
    if started is not None:
        yield (
            "work",
            f"{started.steps:,} steps of {report.run.train.batch_size} rows; "
            f"{counted(started.num_train_rows, 'row')} to train on, "
            f"{started.num_eval_rows:,} held out",
        )
    yield "seeds", ", ".join(map(str, report.seeds))
    yield "settings", _settings(report.settings) or "the defaults"
    made_of = next((run.made_of for method in report.methods for run in method.runs), {})
    if made_of:
        device = made_of["device"] if made_of["device"] != "cpu" else made_of["processor"]
        threads = counted(int(made_of["threads"]), "thread")
        yield "machine", f"{device}, {threads}"
        packages = ("nibble", "torch", "transformers", "tokenizers", "safetensors")
        listed = ", ".join(f"{name} {made_of.get(name)}" for name in packages)
        yield "packages", f"{listed}; no method needs others"
    if report.kernels:
        yield "kernels", "; ".join(f"{what}: {how}" for what, how in report.kernels.items())


def _outcome_rows(report: Report) -> Iterator[tuple[str, ...]]:
    yield ("finished", *(f"{len(m.runs)} of {m.num_runs}" for m in report.methods))
    if any(method.status != FINISHED for method in report.methods):
        yield ("outcome", *(method.status for method in report.methods))


def _six_rows(report: Report) -> Iterator[tuple[str, ...]]:
    """What matters most of each criterion; of a method without a run, how it ended."""
    for group, told in zip(GROUPS, _MOST, strict=True):
        yield (group, *(told(m) if m.runs else m.status for m in report.methods))


def _size(method: Method) -> str:
    base, saved, share = _told(method, "base_bytes", "saved_bytes", "saved_share")
    return f"base {base}, saved {saved} ({share} of it)"


def _time(method: Method) -> str:
    whole, step, rate = _told(method, "train_seconds", "step_seconds", "tokens_per_s")
    return f"{whole}; a step {step}; {rate} tokens/s"


def _memory(method: Method) -> str:
    cuts = [f"{cut} than full" for cut in _told(method, "cut_from_full")]
    return ", ".join([*_told(method, "peak_memory_bytes"), *cuts])


def _quality(method: Method) -> str:
    told = [f"held-out loss {found}" for found in _told(method, "eval_loss")]
    told += [f"tokens right {found}" for found in _told(method, "token_accuracy")]
    told += [f"short answers right {found}" for found in _told(method, "exact_match")]
    told += [f"forgot {found} nats" for found in _told(method, "forgetting")]
    return "; ".join(told) or "-"


def _setting_up(method: Method) -> str:
    own = _settings(method.own_settings) or "the settings of all"
    return f"{own}; {counted(len(method.warnings), 'warning')}"


def _hardware(method: Method) -> str:
    return _smallest(method.smallest) if method.devices else "-"


def _told(method: Method, *keys: str) -> list[str]:
    """Those figures that there are, as they are written."""
    found = {key: method.figures.get(key) for key in keys}
    return [written(one, BY_KEY[key].unit) for key, one in found.items() if one is not None]


# By criterion, in the order of GROUPS.
_MOST = (_size, _time, _memory, _quality, _setting_up, _hardware)


def _rows(report: Report, group: str) -> Iterator[tuple[str, ...]]:
    for criterion in CRITERIA:
        found = [method.figures.get(criterion.key) for method in report.methods]
        if criterion.group == group and any(found):
            yield (criterion.title, *(written(one, criterion.unit) for one in found))
    if group == "Setting up":
        yield ("settings of its own", *(_settings(m.own_settings) or "-" for m in report.methods))
        yield ("chosen by the plan", *map(_planned, report.methods))
        yield ("warnings", *(str(len(m.warnings)) if m.runs else "-" for m in report.methods))
    if group == "Hardware" and any(method.devices for method in report.methods):
        yield ("smallest device that fits", *(_smallest(m.smallest) for m in report.methods))


def _planned(method: Method) -> str:
    """What the plan chose, each way once."""
    ways = [_way(run.settings) for run in method.runs if run.settings]
    return " or ".join(dict.fromkeys(ways)) or "-"


def _way(settings: dict[str, Any]) -> str:
    number = settings["train.micro_batch_size"]
    paged = ", paged" if settings.get("optim.paged") else ""
    host = ", embeddings on the host" if settings.get("model.embeddings") == "host" else ""
    return f"{counted(number, 'row')} a pass, recompute {settings['train.recompute']}{paged}{host}"


def _smallest(found: OnDevice | None) -> str:
    return f"{found.device}, needs {size(found.needed_bytes)}" if found else "none"


def _other_tables(report: Report) -> Iterator[Table]:
    if report.differences:
        columns = ("", "difference", "95 % interval", "in per cent", "told apart from 0")
        rows = tuple(_difference_row(found) for found in report.differences)
        about = "The first method less the second, of runs with the same seed."
        yield Table("Differences, seed by seed", columns, rows, about)
    devices = list(
        dict.fromkeys(
            one.device for method in report.methods for one in method.devices if not one.is_smallest
        )
    )
    if devices:
        columns = ("", *(method.name for method in report.methods))
        rows = tuple(
            (device, *(_on_device(method, device) for method in report.methods))
            for device in devices
        )
        about = "Planned, nothing was run: memory that has to fit, time and price of all steps."
        yield Table("The same work on other GPUs", columns, rows, about)


def _difference_row(found: Difference) -> tuple[str, ...]:
    criterion = BY_KEY[found.key]
    value, unit = found.found, criterion.unit
    points = " points" if unit == "share" else ""
    interval = "one seed"
    if value.low is not None and value.high is not None:
        interval = f"{_signed(value.low, unit)} to {_signed(value.high, unit)}{points}"
    is_told = "one seed" if value.low is None else "yes" if value.is_apart_from_0 else "no"
    title = f"{criterion.title}: {found.ours} - {found.theirs}"
    share = "-" if found.key == "forgetting" else f"{100 * found.share:+.2f} %"
    return title, f"{_signed(value.value, unit)}{points}", interval, share, is_told


def _signed(value: float, unit: Any) -> str:
    """With its sign; a share in points."""
    return f"{100 * value:+.1f}" if unit == "share" else f"{value:+.4f}"


def _on_device(method: Method, device: str) -> str:
    found = next((one for one in method.devices if one.device == device), None)
    if found is None:
        return "-"
    needs = size(found.needed_bytes)
    if not found.fits:
        return f"does not fit: {needs}"
    total = "" if found.total_seconds is None else f", {_span(found.total_seconds)}"
    return f"{needs}{total}{_price(found.cost)}"


def _price(cost: float | None) -> str:
    if cost is None:
        return ""
    return f", {cost:.2f} USD" if cost >= 0.01 else ", < 0.01 USD"


def _span(seconds: float) -> str:
    if seconds < 120:
        return "< 0.1 s" if seconds < 0.1 else f"{seconds:.{1 if seconds < 10 else 0}f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _notes(report: Report) -> Iterator[str]:
    yield from (f"{method.name}: {method.reason}" for method in report.methods if method.reason)
    yield from filter(None, [beside_lora(report)])
    yield from _how_measured(report)
    yield from _uneven(report)
    if report.differs:
        yield f"Not the same in all runs, so compare with care: {', '.join(report.differs)}."
    warned: dict[str, list[str]] = {}
    for method in report.finished:
        for warning, count in method.warnings.items():
            of = f"{count} of {len(method.runs)} of {method.name}"
            warned.setdefault(warning, []).append(of)
    for warning, runs in warned.items():
        yield f"Warning in some runs ({', '.join(runs)}): {warning}"


def _how_measured(report: Report) -> Iterator[str]:
    if len(report.seeds) > 1:
        yield (
            f"Figures are means over {len(report.seeds)} seeds; ± is half of Student's 95 % "
            "interval. Differences are taken seed by seed, so that what a seed brings cancels out; "
            "of twenty such intervals one leaves out the truth by chance."
        )
    if isinstance(report.run.data.eval, float):
        yield "Held-out rows are drawn anew with each seed: the intervals cover that as well."
    if report.num_short:
        yield (
            f"Short answers: greedy, all or nothing, {counted(report.num_short, 'held-out row')} "
            f"with answers of at most {SHORT_TOKENS} tokens."
        )
    elif report.finished:
        yield f"No held-out answer has at most {SHORT_TOKENS} tokens: none is right as a whole."
    if report.num_general_tokens:
        yield (
            f"Forgetting is measured on {report.num_general_tokens:,} tokens of general text; "
            "before training that is the base as the method stores it."
        )


def _uneven(report: Report) -> Iterator[str]:
    """A machine that was not always as fast."""
    rates = [[run.values["tokens_per_s"] for run in m.runs] for m in report.finished]
    most = max((max(found) / min(found) for found in rates), default=1.0)
    if most > UNEVEN:
        yield (
            f"Runs of one method differ up to {most:.1f} times in speed: this machine did "
            "something else as well. Take times with care; losses are not touched."
        )


def _settings(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key}={_plain(value)}" for key, value in settings.items())


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
