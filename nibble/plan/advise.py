"""LoRA or QLoRA, and with which settings: the fastest way that fits, and why.

    every option -> forecast of memory and time -> those that fit -> the fastest of each method
                 -> the method, its reasons, and the runner-up

No rule here says which method a device wants: bytes and seconds decide.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nibble.config import RunConfig
from nibble.model.skeleton import build_config
from nibble.plan.budget import CONTEXT_BYTES, budget_bytes
from nibble.plan.devices import Device
from nibble.plan.estimate import rates_of
from nibble.plan.forecast import Forecast, Forecaster, Option, forecaster
from nibble.plan.loosen import changes_that_fit
from nibble.plan.rows import Rows
from nibble.plan.watch import BASE_4BIT, BASE_DENSE, EMBEDDINGS, MOMENTS, SAVED
from nibble.units import counted, gigabytes

# More tokens in a forward pass bring nothing: products are at full speed.
PASS_TOKENS = {"cuda": 8192, "cpu": 4096}
# From the least recomputation, the fastest, to the most.
POLICIES = {
    "cuda": ("none", "selective", "offload", "full", "tiled"),
    "cpu": ("none", "selective", "full"),
}
# Those that need the least memory; all but full also need memory of the host.
THRIFTIEST = {"cuda": ("tiled", "offload", "full"), "cpu": ("full",)}
# Recomputing more costs at least this factor, however many rows it makes room for.
RECOMPUTE_COSTS = 1.05
# Moments below this share of the memory are not worth a second look at everything.
LARGE_SHARE = 0.05
# Times closer than this are the same to a person.
_SAME_PACE = 0.005


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

    @property
    def has_tied_head(self) -> bool:
        """Whether the table of embeddings is the head as well."""
        return build_config(self.values).tie_word_embeddings

    @property
    def is_timed(self) -> bool:
        """Whether the rates of the device are known."""
        return rates_of(self.device).is_known

    def fits(self, forecast: Forecast) -> bool:
        """Whether the device, and its host where that is known, have what a way to run needs."""
        host = self.device.host_memory_bytes
        return forecast.needed_bytes <= self.budget and (
            host is None or forecast.host_bytes <= host
        )

    def forecaster(self) -> Forecaster:
        """Forecasts of options of this run, corrected by past runs."""
        forecast = forecaster(self.run, self.values, self.rows, self.device)
        return lambda option: forecast(option).corrected(self.correction)


def advise(question: Question) -> Choice:
    """The fastest option that fits, of the methods and settings that the run leaves open."""
    forecast = question.forecaster()
    best: dict[str, Forecast] = {}
    first_look = _policies(question)[0]
    # QLoRA first: where the base in 16 bits is too large, one look beside its settings is enough.
    for method in reversed(_methods(question.run)):
        best[method] = _best(question, forecast, method, first_look)
        first_look = best[method].option.recompute
    fitting = [f for f in best.values() if question.fits(f)]
    if not fitting:
        closest = min(_thriftiest(question, forecast), key=lambda f: f.needed_bytes)
        return Choice(
            forecast=closest,
            fits=False,
            reasons=(_does_not_fit(question, closest),),
            changes=tuple(_changes(question, closest)),
        )
    # The fastest; at a tie LoRA, which is exact.
    chosen = min(fitting, key=lambda f: (f.step_seconds, f.option.method))
    others = [f for m, f in best.items() if m != chosen.option.method]
    reasons = [
        _why_method(question, chosen, others),
        *_why_settings(question, chosen, forecast),
    ]
    return Choice(chosen, True, tuple(reasons), others[0] if others else None)


def _methods(run: RunConfig) -> Sequence[str]:
    return ("lora", "qlora") if run.method == "auto" else (run.method,)


def _best(question: Question, forecast: Forecaster, method: str, first_look: str) -> Forecast:
    """The fastest option of a method that fits, or else one that does not."""
    smallest, found = _sizes(question)[0], []
    first: Forecast | None = None
    for optimizer, paged in _optimizers(question):
        if found and not (paged and _is_paging_worth_it(question, found[0])):
            break
        start = _option(question, Option(method, first_look, smallest, optimizer, paged))
        first = forecast(start)
        if first.phases["load"].bytes > question.budget:
            return first  # the base alone is too large
        fastest = _fastest(question, forecast, start)
        found += [] if fastest is None else [fastest]
    assert first is not None
    return min(found, key=lambda f: f.step_seconds) if found else first


def _fastest(question: Question, forecast: Forecaster, start: Option) -> Forecast | None:
    """The fastest of the policies and numbers of rows that fit."""
    smallest, *sizes = _sizes(question)
    fitting: list[Forecast] = []
    for recompute in _policies(question):
        option = replace(start, recompute=recompute, micro_batch_size=smallest)
        option = _option(question, option)
        if not question.fits(forecast(option)):
            continue
        tried = [forecast(replace(option, micro_batch_size=size)) for size in (smallest, *sizes)]
        fitting += filter(question.fits, tried)
        shortest = min(f.step_seconds for f in tried)
        if any(f.step_seconds <= RECOMPUTE_COSTS * shortest for f in fitting):
            break
    return min(fitting, key=lambda f: (f.step_seconds, f.needed_bytes), default=None)


def _is_paging_worth_it(question: Question, found: Forecast) -> bool:
    """Whether a way that fits would be faster with the memory that moments take."""
    is_fastest = found.option.recompute == _policies(question)[0]
    moments = found.phases["optimizer"].parts.get(MOMENTS, 0)
    return not is_fastest and moments > LARGE_SHARE * question.budget


def _thriftiest(question: Question, forecast: Forecaster) -> Iterator[Forecast]:
    """What needs the least memory of each method that is open."""
    optimizer, paged = list(_optimizers(question))[-1]
    for method in _methods(question.run):
        start = Option(method, "full", _sizes(question)[0], optimizer, paged)
        yield from map(forecast, _thrifty_options(question, start))


def _thrifty_options(question: Question, start: Option) -> list[Option]:
    """`start` with the policies that need the least memory; without a known host only the first."""
    asked = question.run.train.recompute
    policies = THRIFTIEST[question.device.type] if asked == "auto" else (asked,)
    if question.device.host_memory_bytes is None:
        policies = policies[:1]
    return [_option(question, replace(start, recompute=policy)) for policy in policies]


def _option(question: Question, option: Option) -> Option:
    """The option with embeddings where they are asked to be, or where they belong with it."""
    asked = question.run.model.embeddings
    is_least = option.recompute == "tiled" and option.method != "full"
    if asked == "auto":
        asked = "host" if is_least and not question.has_tied_head else "device"
    return replace(option, embeddings=asked)


def _policies(question: Question) -> Sequence[str]:
    asked = question.run.train.recompute
    return POLICIES[question.device.type] if asked == "auto" else (asked,)


def _sizes(question: Question) -> list[int]:
    """Rows per forward pass: as asked, or as far as more of them make products faster."""
    asked = question.run.train.micro_batch_size
    if asked != "auto":
        return [int(asked)]
    most = PASS_TOKENS[question.device.type]
    sizes = sorted(question.rows.worst)
    return [s for s in sizes if s == sizes[0] or sum(question.rows.worst[s]) <= most]


def _optimizers(question: Question) -> Iterator[tuple[str, bool]]:
    """As asked; then with pages, whose arithmetic is the same, or else with moments of 8 bits."""
    optim = question.run.optim
    yield optim.name, optim.paged is True
    if optim.paged == "auto" and question.device.type == "cuda":
        yield optim.name, True
    elif question.run.origin("optim.name") == "default":
        yield "adamw8bit", optim.paged is True


def _why_method(question: Question, chosen: Forecast, others: Sequence[Forecast]) -> str:
    method, has = chosen.option.method, f"the device has {gigabytes(question.budget)}"
    if not others:
        return f"{method} was asked for: it needs {gigabytes(chosen.needed_bytes)}, {has}."
    other = others[0]
    name, how = other.option.method, _how(other.option)
    if not question.fits(other):
        return f"{method}: {name} needs {gigabytes(other.needed_bytes)} with {how}, {has}."
    slower = f"{name} with {how} would be {pace(question, other, chosen)}"
    if method == "qlora":
        return f"qlora: the memory that 4 bits save is spent on the passes; {slower}."
    return f"lora: the base fits in 16 bits and stays exact; {slower}."


def pace(question: Question, other: Forecast, chosen: Forecast) -> str:
    """How much longer a step of another way takes, in words."""
    longer = other.step_seconds / chosen.step_seconds - 1
    if abs(longer) < _SAME_PACE:
        return "as fast"
    words = f"{abs(longer):.0%} {'slower' if longer > 0 else 'faster'}"
    return words if question.is_timed else f"{words} at the rates of a usual card"


def _how(option: Option) -> str:
    paged = ", paged" if option.paged else ""
    return (
        f"recompute {option.recompute} and {counted(option.micro_batch_size, 'row')} a pass{paged}"
    )


def _why_settings(question: Question, chosen: Forecast, forecast: Forecaster) -> Iterator[str]:
    option, run = chosen.option, question.run
    if run.method == "auto":
        yield _qlora_saves(replace(option, micro_batch_size=_sizes(question)[0]), forecast)
    if run.train.recompute == "auto":
        yield _why_recompute(question, chosen, forecast)
    if run.train.micro_batch_size == "auto":
        tokens = sum(question.rows.worst[option.micro_batch_size])
        num_rows = min(run.train.batch_size, question.rows.num_rows)
        share = (
            f"{option.micro_batch_size} of the {num_rows} rows" if num_rows > 1 else "The one row"
        )
        yield f"{share} of a step in a forward pass, at most {tokens:,} tokens."
    if option.paged and run.optim.paged == "auto":
        resident = forecast(replace(option, paged=False))
        yield (
            "Optimizer state is paged to host memory: kept on the device the run would need "
            f"{gigabytes(resident.needed_bytes)}."
        )
    if option.optimizer != run.optim.name:
        yield "Moments are kept in 8 bits: in 32 bits the run would not fit."


def _qlora_saves(option: Option, forecast: Forecaster) -> str:
    lora, qlora = (forecast(replace(option, method=m)).peak_bytes for m in ("lora", "qlora"))
    change = "less" if qlora <= lora else "more"
    percent = f"{abs(1 - qlora / lora):.0%} {change}"
    return f"With {_how(option)} qlora needs {percent} memory than lora."


def _why_recompute(question: Question, chosen: Forecast, forecast: Forecaster) -> str:
    option = chosen.option
    if option.recompute == "none":
        return (
            f"recompute none: activations take {gigabytes(_saved(chosen))}; recomputing them "
            f"would make a step {chosen.forward_share:.0%} slower."
        )
    lighter = forecast(replace(option, recompute="none", micro_batch_size=_sizes(question)[0]))
    kept = f"with {_how(lighter.option)}"
    if question.fits(lighter):
        return (
            f"recompute {option.recompute}: {kept} a step would be "
            f"{pace(question, lighter, chosen)}."
        )
    needs = gigabytes(lighter.needed_bytes)
    return f"recompute {option.recompute}: {kept} the run would need {needs}."


def _saved(forecast: Forecast) -> int:
    return forecast.phases["backward"].parts.get(SAVED, 0)


def _does_not_fit(question: Question, closest: Forecast) -> str:
    needs = f"nothing fits: {closest.option.method} with {_how(closest.option)} needs"
    if closest.needed_bytes <= question.budget:
        has = gigabytes(question.device.host_memory_bytes or 0)
        return f"{needs} {gigabytes(closest.host_bytes)} of host memory, this machine has {has}."
    has = f"the device has {gigabytes(question.budget)}"
    if not question.budget:
        has = f"the CUDA context alone takes {gigabytes(CONTEXT_BYTES)}"
    return f"{needs} {gigabytes(closest.needed_bytes)}, {has}."


def _changes(question: Question, closest: Forecast) -> Iterator[str]:
    """Three changes that would make it fit, the smallest first."""

    def would_fit(run: RunConfig) -> bool:
        asked = replace(question, run=run, rows=question.rows.cut(run.data.max_seq_len))
        return any(map(asked.fits, _thriftiest(asked, asked.forecaster())))

    is_base_too_large = closest.phases["load"].bytes > question.budget
    found = changes_that_fit(question.run, would_fit, is_base_too_large=is_base_too_large)
    yield from found
    if closest.needed_bytes > question.budget:
        what = "memory" if question.device.type == "cpu" else "a device"
        wanted = closest.needed_bytes + (question.device.memory_bytes - question.budget)
        yield f"{what} with at least {-(-wanted // 2**30)} GiB"
    parts = closest.phases["load"].parts
    base = sum(parts.get(part, 0) for part in (BASE_4BIT, BASE_DENSE, EMBEDDINGS))
    left = question.budget - (closest.needed_bytes - base)
    if len(found) < 2 and 0 < left < base:
        yield f"a base of at most {gigabytes(left)} where this one takes {gigabytes(base)}"
