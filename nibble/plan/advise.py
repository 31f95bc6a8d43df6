"""LoRA or QLoRA, and with which settings: the fastest way that fits, and why.

    every option -> forecast of memory and time -> those that fit -> the fastest of each method
                 -> the method, its reasons, and the runner-up

No rule here says which method a device wants: bytes and seconds decide.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nibble.config import RunConfig
from nibble.plan.budget import budget_bytes
from nibble.plan.devices import Device
from nibble.plan.forecast import Forecast, Forecaster, Option, forecaster
from nibble.plan.rows import Rows, full_rows
from nibble.plan.watch import SAVED

# More tokens in a forward pass bring nothing: products are at full speed.
PASS_TOKENS = {"cuda": 8192, "cpu": 4096}
# From the least recomputation, the fastest, to the least memory.
POLICIES = {"cuda": ("none", "selective", "offload", "full"), "cpu": ("none", "selective", "full")}
# Recomputing more costs at least this factor, however many rows it makes room for.
RECOMPUTE_COSTS = 1.05
_SHORTEST = 64


@dataclass(frozen=True)
class Choice:
    """The chosen way to run, or the way that comes closest where none fits.

    Args:
        forecast: What it needs.
        fits: Whether that is within the budget.
        reasons: Sentences for a person.
        runner_up: The best way of the other method, or None where the method was given.
        changes: Where nothing fits: what would, smallest change first.
    """

    forecast: Forecast
    fits: bool
    reasons: tuple[str, ...]
    runner_up: Forecast | None = None
    changes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Question:
    """A run, the model's config.json, the rows and the device that is asked about.

    `correction` is what past runs on the device took over what was planned for them.
    """

    run: RunConfig
    values: dict[str, Any]
    rows: Rows
    device: Device
    correction: float = 1.0

    @property
    def budget(self) -> int:
        """Bytes that one device has for the run."""
        return budget_bytes(self.device)

    def forecaster(self) -> Forecaster:
        """Forecasts of options of this run, corrected by past runs."""
        forecast = forecaster(self.run, self.values, self.rows, self.device)
        return lambda option: forecast(option).corrected(self.correction)


def advise(question: Question) -> Choice:
    """The fastest option that fits, of the methods and settings that the run leaves open."""
    forecast = question.forecaster()
    best = {method: _best(question, forecast, method) for method in _methods(question.run)}
    fitting = {m: f for m, f in best.items() if f.needed_bytes <= question.budget}
    if not fitting:
        closest = min(best.values(), key=lambda f: f.needed_bytes)
        return Choice(
            forecast=closest,
            fits=False,
            reasons=(_does_not_fit(question, closest),),
            changes=tuple(_changes(question, closest)),
        )
    # The fastest, so that more memory never makes a plan slower; at a tie LoRA, which is exact.
    chosen = min(fitting.values(), key=lambda f: f.step_seconds)
    others = [f for m, f in best.items() if m != chosen.option.method]
    reasons = [
        _why_method(question, chosen, best),
        *_why_settings(question, chosen, forecast),
    ]
    return Choice(chosen, True, tuple(reasons), others[0] if others else None)


def _methods(run: RunConfig) -> Sequence[str]:
    return ("lora", "qlora") if run.method == "auto" else (run.method,)


def _best(question: Question, forecast: Forecaster, method: str) -> Forecast:
    """The fastest option of a method that fits, or else the one that needs the least."""
    sizes, policies = _sizes(question), _policies(question)
    smallest: list[Forecast] = []
    for optimizer, paged in _optimizers(question):
        start = Option(method, policies[-1], sizes[0], optimizer, paged)
        # Where the policies that keep the least did not fit, nothing else will.
        tried = policies[-2:] if smallest else policies
        fitting: list[Forecast] = []
        for recompute in tried:
            found = [
                forecast(replace(start, recompute=recompute, micro_batch_size=size))
                for size in sizes
            ]
            if found[0].phases["load"].bytes > question.budget:
                return forecast(start)  # the base alone is too large
            smallest.append(found[0])
            fitting += [f for f in found if f.needed_bytes <= question.budget]
            least = min(f.step_seconds for f in found)
            if any(f.step_seconds <= RECOMPUTE_COSTS * least for f in fitting):
                break
        if fitting:
            return min(fitting, key=lambda f: (f.step_seconds, f.needed_bytes))
    return min(smallest, key=lambda f: f.needed_bytes)


def _policies(question: Question) -> Sequence[str]:
    asked = question.run.train.recompute
    return POLICIES[question.device.type] if asked == "auto" else (asked,)


def _sizes(question: Question) -> list[int]:
    """Rows per forward pass, as far as more of them make products faster."""
    most = PASS_TOKENS[question.device.type]
    sizes = sorted(question.rows.worst)
    return [s for s in sizes if s == sizes[0] or sum(question.rows.worst[s]) <= most]


def _optimizers(question: Question) -> Iterator[tuple[str, bool]]:
    """As asked; then with pages, whose arithmetic is the same; then with moments of 8 bits."""
    optim = question.run.optim
    is_open = optim.paged == "auto"
    yield optim.name, optim.paged is True
    if is_open and question.device.type == "cuda":
        yield optim.name, True
    if question.run.origin("optim.name") == "default":
        yield "adamw8bit", optim.paged is True


def _why_method(question: Question, chosen: Forecast, best: dict[str, Forecast]) -> str:
    method = chosen.option.method
    if question.run.method != "auto":
        return (
            f"{method} was asked for: it needs {_gb(chosen.needed_bytes)} of the "
            f"{_gb(question.budget)} that the device has for it."
        )
    lora, qlora = best["lora"], best["qlora"]
    if lora.needed_bytes > question.budget:
        return (
            f"qlora: lora needs {_gb(lora.needed_bytes)} with {_how(lora.option)} and the device "
            f"has {_gb(question.budget)}; with the base in 4 bits the run takes "
            f"{_gb(qlora.needed_bytes)}."
        )
    ratio = qlora.step_seconds / lora.step_seconds
    if method == "qlora":
        return (
            f"qlora: both fit, and it is {100 * (1 - ratio):.0f} % faster, since the memory that 4 "
            f"bits save is spent on the passes ({_how(qlora.option)} instead of "
            f"{_how(lora.option)})."
        )
    return (
        f"lora: the base fits in 16 bits ({_gb(lora.needed_bytes)} of {_gb(question.budget)}) and "
        f"stays exact; qlora would be {100 * (ratio - 1):.0f} % slower."
    )


def _how(option: Option) -> str:
    rows = "1 row" if option.micro_batch_size == 1 else f"{option.micro_batch_size} rows"
    return f"recompute {option.recompute} and {rows} a pass"


def _why_settings(question: Question, chosen: Forecast, forecast: Forecaster) -> Iterator[str]:
    option = chosen.option
    twin_method = {"lora": "qlora", "qlora": "lora"}.get(option.method)
    if twin_method:
        twin = forecast(replace(option, method=twin_method))
        low, high = sorted((chosen.peak_bytes, twin.peak_bytes))
        saved = 100 * (1 - low / high)
        yield f"With these settings qlora needs {saved:.0f} % less memory than lora."
    if question.run.train.recompute == "auto":
        yield from _why_recompute(question, option, forecast)
    tokens = sum(question.rows.worst[option.micro_batch_size])
    if question.run.train.micro_batch_size == "auto":
        yield (
            f"{option.micro_batch_size} of the {question.run.train.batch_size} rows of a step in a "
            f"forward pass, at most {tokens:,} tokens."
        )
    if option.paged and question.run.optim.paged == "auto":
        yield "Optimizer state is paged to host memory: without it the run would not fit."
    if option.optimizer != question.run.optim.name:
        yield "Moments are kept in 8 bits: in 32 bits the run would not fit."


def _why_recompute(question: Question, option: Option, forecast: Forecaster) -> Iterator[str]:
    chosen = forecast(option)
    if option.recompute == "none":
        yield (
            f"recompute none: activations take {_gb(_saved(chosen))}; recomputing them would make "
            f"a step {100 * chosen.forward_share:.0f} % slower."
        )
        return
    lighter = forecast(replace(option, recompute="none"))
    yield (
        f"recompute {option.recompute}: with all activations kept, {_gb(_saved(lighter))} of them, "
        f"the run would need {_gb(lighter.needed_bytes)}."
    )


def _saved(forecast: Forecast) -> int:
    return forecast.phases["backward"].parts.get(SAVED, 0)


def _does_not_fit(question: Question, closest: Forecast) -> str:
    return (
        f"nothing fits: {closest.option.method} with recompute {closest.option.recompute} and "
        f"{closest.option.micro_batch_size} row a pass needs {_gb(closest.needed_bytes)}, the "
        f"device has {_gb(question.budget)}."
    )


def _changes(question: Question, closest: Forecast) -> Iterator[str]:
    """Three changes that would make it fit, the smallest first."""
    found: list[str] = []
    # Where the base alone is too large, only another base or another device would help.
    if closest.phases["load"].bytes <= question.budget or question.run.method != "auto":
        found = _first_that_fit(question)
    yield from found[:2]
    what = "memory" if question.device.type == "cpu" else "a device"
    wanted = closest.needed_bytes + (question.device.memory_bytes - question.budget)
    yield f"{what} with at least {-(-wanted // 2**30)} GiB"
    if len(found) < 2:
        share = question.budget / closest.needed_bytes
        yield f"a model of at most {max(0.0, share):.0%} as many weights"


def _first_that_fit(question: Question) -> list[str]:
    """Of each kind of change the smallest one that fits: method, shorter rows, a lower rank too."""
    run = question.run
    lengths = [run.data.max_seq_len >> halvings for halvings in range(1, 15)]
    lengths = [length for length in lengths if length >= _SHORTEST]
    kinds: list[list[dict[str, Any]]] = [[{"data.max_seq_len": length} for length in lengths]]
    if run.method in ("lora", "full"):
        kinds.insert(0, [{"method": "qlora"}])
    if run.method != "full":
        rank = max(1, run.lora.rank // 4)
        kinds.append([{"lora.rank": rank, "data.max_seq_len": length} for length in lengths])
    fitting = (next((c for c in kind if _would_fit(question, c)), None) for kind in kinds)
    return [", ".join(f"{k}={v}" for k, v in changed.items()) for changed in fitting if changed]


def _would_fit(question: Question, changed: dict[str, Any]) -> bool:
    """Whether the run with other values fits, in the way that needs the least."""
    run = question.run.with_values(changed, "planner")
    rows = full_rows(run) if "data.max_seq_len" in changed else question.rows
    asked = replace(question, run=run, rows=rows)
    optimizer, paged = list(_optimizers(asked))[-1]
    policies, forecast = _policies(asked), asked.forecaster()
    options = (
        Option(_methods(run)[-1], recompute, _sizes(asked)[0], optimizer, paged)
        for recompute in policies[-2:]
    )
    return any(forecast(option).needed_bytes <= asked.budget for option in options)


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB"
