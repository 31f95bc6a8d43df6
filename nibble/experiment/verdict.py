"""Which method to use, why, and what would change the answer: sentences of a report."""

from collections.abc import Iterator
from statistics import fmean

from nibble.experiment.criteria import plain
from nibble.experiment.report import Difference, Method, Report
from nibble.units import counted, size

# Of losses that differ by less than this share, neither is better to a person.
SAME_LOSS = 0.01
# Runs that take this much longer than the fastest are as fast to a person.
SAME_TIME = 0.05


def verdict(report: Report) -> list[str]:
    """Sentences of one paragraph."""
    measured = [method for method in report.finished if "eval_loss" in method.figures]
    if not measured:
        return ["No run is finished, so nothing can be said of the methods."]
    best = min(measured, key=_loss)
    as_good = [method for method in measured if _is_as_good(report, method, best)]
    chosen = _choose(as_good)
    others = [method for method in measured if method is not chosen]
    return [
        f"Use {chosen.name} here.",
        _why(report, chosen, best, as_good),
        *(_beside(report, chosen, other, best) for other in others),
        *_missing(report),
        *_changes(report, chosen, measured),
    ]


def beside_lora(report: Report) -> str:
    """How QLoRA's held-out loss stands to LoRA's; empty where one of them is missing."""
    found = report.difference("eval_loss", "qlora", "lora")
    if found is None:
        return ""
    is_within = abs(found.share) <= SAME_LOSS
    way = "above" if found.share > 0 else "below"
    return (
        f"qlora's mean held-out loss is {100 * abs(found.share):.2f} % {way} lora's, "
        f"{'within' if is_within else 'more than'} 1 %: {_told(found)}."
    )


def _loss(method: Method) -> float:
    return method.figures["eval_loss"].value


def _seconds(method: Method) -> float:
    return method.figures["train_seconds"].value


def _times(ours: Method, theirs: Method, key: str) -> float:
    """The mean over seeds of a figure of one over that of another."""
    others = {run.seed: run.values[key] for run in theirs.runs}
    return fmean(run.values[key] / others[run.seed] for run in ours.runs if run.seed in others)


def _peak(method: Method) -> float:
    return method.figures["peak_memory_bytes"].value


def _between(report: Report, method: Method, other: Method) -> tuple[Difference | None, float]:
    """The difference of two methods, and the share by which the first loses more."""
    found = report.difference("eval_loss", method.name, other.name)
    if found is None:
        found = report.difference("eval_loss", other.name, method.name)
    return found, _loss(method) / _loss(other) - 1


def _is_as_good(report: Report, method: Method, best: Method) -> bool:
    found, share = _between(report, method, best)
    if method is best or share <= SAME_LOSS:
        return True
    return found is not None and _is_open(found)


def _choose(methods: list[Method]) -> Method:
    """The fastest; of those that are as fast, the one that takes the least memory."""
    fastest = min(map(_seconds, methods))
    quick = [m for m in methods if _seconds(m) <= (1 + SAME_TIME) * fastest]
    return min(quick, key=_peak)


def _why(report: Report, chosen: Method, best: Method, as_good: list[Method]) -> str:
    loss = f"{chosen.name}'s held-out loss of {_loss(chosen):.4f}"
    if chosen is best:
        return f"{loss} is the lowest."
    found, share = _between(report, chosen, best)
    assert found is not None, "both have a seed in common"
    why = f"{loss} is {_percent(share)} above the lowest, {best.name}'s"
    apart = "" if share <= SAME_LOSS else ", which the seeds do not tell apart"
    is_quickest = chosen is min(as_good, key=_seconds)
    how = "the quickest" if is_quickest else "as quick as any and takes the least memory"
    return f"{why}{apart}; of those that are as good it is {how}."


def _beside(report: Report, chosen: Method, other: Method, best: Method) -> str:
    found, share = _between(report, other, chosen)
    way = f"{_percent(abs(share))} {'higher' if share > 0 else 'lower'}"
    if other is best:
        loss = ""
    elif abs(share) <= SAME_LOSS:
        loss = "is as good, and "
    elif found is not None and _is_open(found):
        loss = f"has a loss {way}, which the seeds do not tell apart, and "
    else:
        loss = f"has a loss {way}, and "
    times = _times(other, chosen, "train_seconds")
    memory = _times(other, chosen, "peak_memory_bytes") - 1
    pace = "the same time" if abs(times - 1) < SAME_TIME else f"{times:.2f} times the time"
    bytes_ = f"{_percent(abs(memory))} {'more' if memory > 0 else 'less'} memory"
    return f"{other.name} {loss}takes {pace} and {bytes_}."


def _missing(report: Report) -> Iterator[str]:
    for method in report.methods:
        if method.status != "finished":
            yield f"{method.name} {_ended(method)}."


def _ended(method: Method) -> str:
    if method.status == "failed":
        return f"failed in some of its {counted(method.num_runs, 'run')}"
    return "does not fit here"


def _changes(report: Report, chosen: Method, measured: list[Method]) -> Iterator[str]:
    lighter = min(measured, key=_peak)
    if lighter is not chosen:
        yield (
            f"Where {chosen.name}'s {size(_peak(chosen))} are too much, the answer is "
            f"{lighter.name} with {size(_peak(lighter))}."
        )
    lora = next((m for m in measured if m.name == "lora"), None)
    if lora is not None and any(m.name == "qlora" for m in measured):
        share = lora.figures["base_bytes"].value / _peak(lora)
        yield (
            f"The base is {_percent(share)} of lora's peak here; with a larger base it is more, "
            "and so is what qlora saves."
        )
    yield from _forgetting(report, chosen, measured)
    if len(report.seeds) == 1:
        yield "One seed cannot tell a difference from chance: more --seeds may change the answer."
    open_ones = [f for f in _of_loss(report) if abs(f.share) > SAME_LOSS and _is_open(f)]
    if open_ones:
        pairs = ", ".join(f"{f.ours} from {f.theirs}" for f in open_ones)
        yield f"More seeds may tell {pairs}."
    if _has_one_rate(report):
        yield (
            "All methods had one learning rate, and lora usually wants ten times that of full: "
            "--set full:optim.lr=... gives full its own."
        )


def _forgetting(report: Report, chosen: Method, measured: list[Method]) -> Iterator[str]:
    """Which forgot less, where that is told."""
    known = [method for method in measured if "forgetting" in method.figures]
    least = min(known, key=lambda method: method.figures["forgetting"].value, default=chosen)
    for names in ((least.name, chosen.name), (chosen.name, least.name)):
        found = report.difference("forgetting", *names)
        if found is not None and found.found.is_apart_from_0:
            ours, theirs = (m.figures["forgetting"].value for m in (least, chosen))
            yield (
                f"Where what the base knew counts, {least.name} forgot less: {ours:+.2f} nats on "
                f"general text against {theirs:+.2f}."
            )


def _of_loss(report: Report) -> list[Difference]:
    return [found for found in report.differences if found.key == "eval_loss"]


def _is_open(found: Difference) -> bool:
    """Whether there are seeds to tell by, and they do not tell."""
    return found.found.low is not None and not found.found.is_apart_from_0


def _has_one_rate(report: Report) -> bool:
    names = [method.name for method in report.finished]
    has_own = any("optim.lr" in method.own_settings for method in report.methods)
    return "full" in names and len(names) > 1 and not has_own


def _told(found: Difference) -> str:
    """The difference with its interval, and whether it is one."""
    value = f"difference {found.found.value:+.4f} nats"
    if found.found.low is None or found.found.high is None:
        return f"{value}, of one seed, which tells no interval"
    interval = f"{found.found.low:+.4f} to {found.found.high:+.4f}"
    apart = "told apart from 0" if found.found.is_apart_from_0 else "not told apart from 0"
    return f"{value}, 95 % interval {interval}, {apart}"


def _percent(share: float) -> str:
    return plain(share, "share")
