"""What each way to run would need: memory and time, from simulations of a shortened model.

Decoder layers repeat, so every part of memory is linear in their number; two simulations with few
layers give the line. Models of another kind are simulated whole. Where rows per pass are to be
chosen, a third simulation with the most of them says what grows with rows and what does not.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from nibble.config import RunConfig
from nibble.kernels.cross_entropy import CHUNK_ROWS
from nibble.model.families import family_of
from nibble.model.skeleton import build_config
from nibble.plan.budget import margin_bytes, workspace_bytes
from nibble.plan.devices import Device
from nibble.plan.estimate import Rates, rates_of, work_seconds
from nibble.plan.rows import Documents, Rows
from nibble.plan.simulate import Shape, Simulation, highest, simulate
from nibble.plan.tracker import HEAD, Operation, Peak

# Below so many layers other moments are the highest than with many; offload keeps two inputs here.
FEWEST_LAYERS = {"none": 2, "selective": 2, "full": 2, "offload": 3, "tiled": 3}
LIBRARIES = "workspace of libraries"
CORRECTION = "learned correction"
# Tokens of the widest pass that is simulated; wider ones lie on the same line.
WIDE_TOKENS = 4096
# Different lengths of documents that a simulation goes through.
MOST_LENGTHS = 8
# Phases whose transient parts grow with the rows of a forward pass.
_PASS = ("forward", "backward")


@dataclass(frozen=True)
class Option:
    """One way to run: the settings that a plan chooses."""

    method: str
    recompute: str
    micro_batch_size: int
    optimizer: str = "adamw"
    paged: bool = False
    embeddings: str = "device"

    def settings(self) -> dict[str, Any]:
        """The same as dotted keys of the config."""
        return {
            "method": self.method,
            "train.micro_batch_size": self.micro_batch_size,
            "train.recompute": self.recompute,
            "optim.name": self.optimizer,
            "optim.paged": self.paged,
            "model.embeddings": self.embeddings,
        }


@dataclass(frozen=True)
class Forecast:
    """What an option needs.

    Args:
        phases: Peak bytes of each phase: tensors, the workspace of libraries, and what past runs
            took above or below that.
        needed_bytes: The highest of them with the margin for fragmentation.
        host_bytes: Host memory of embeddings, of pages and of inputs of layers.
        paged_bytes: The pages alone.
        step_seconds: An optimizer step of average rows; relative where rates are unknown.
        forward_share: Of a step without recomputation, the share that forward passes take.
        num_trainable: Values that are trained.
        num_total: Values of base and adapters.
    """

    option: Option
    phases: dict[str, Peak]
    needed_bytes: int
    host_bytes: int
    paged_bytes: int
    step_seconds: float
    forward_share: float
    num_trainable: int
    num_total: int

    @property
    def peak(self) -> Peak:
        """The highest phase of training."""
        return highest(self.phases)

    @property
    def peak_bytes(self) -> int:
        """Bytes of the highest phase of training."""
        return self.peak.bytes

    def corrected(self, factor: float) -> "Forecast":
        """The same with `factor` times the memory."""
        return replace(
            self,
            phases={
                name: peak.plus(CORRECTION, round((factor - 1) * peak.bytes))
                for name, peak in self.phases.items()
            },
            needed_bytes=round(factor * self.needed_bytes),
        )


Forecaster = Callable[[Option], Forecast]


def forecaster(run: RunConfig, values: dict[str, Any], rows: Rows, device: Device) -> Forecaster:
    """A function that forecasts options of this run; simulations are shared between them."""
    total = _num_layers(values)
    rates = rates_of(device)
    whole = exact_forecast(run, values, rows, device)
    set_size = run.train.micro_batch_size
    fewest = 1 if set_size == "auto" else int(set_size)
    most = max(s for s, docs in rows.worst.items() if s <= 2 * fewest or sum(docs) <= WIDE_TOKENS)

    @cache
    def simulated(option: Option, num_layers: int) -> Simulation:
        return _simulate(run, _with_layers(values, num_layers), rows, option, device)

    @cache
    def forecast(option: Option) -> Forecast:
        lengths = _short_lengths(values, FEWEST_LAYERS[option.recompute])
        if lengths[1] >= total:
            return whole(option)
        # In a full fine-tune the highest moment is another one with more rows: no line leads there.
        base = option.micro_batch_size if option.method == "full" else fewest
        single, largest = (replace(option, micro_batch_size=size) for size in (base, most))
        first, second = (simulated(single, length) for length in lengths)
        long = _extended(first, second, (total - lengths[0]) / (lengths[1] - lengths[0]))
        if option.micro_batch_size > base:
            sizes = (fewest, option.micro_batch_size, most)
            tokens = [sum(rows.worst[size]) for size in sizes]
            wide = simulated(largest, lengths[0])
            shares = _share(tokens), _head_share(tokens, rows)
            long = _widened(long, first, wide, shares, rates)
        return _forecast(run, rows, option, long, (device, rates))

    return forecast


def exact_forecast(
    run: RunConfig, values: dict[str, Any], rows: Rows, device: Device
) -> Forecaster:
    """A function that simulates the whole model for each option."""
    rates = rates_of(device)

    @cache
    def forecast(option: Option) -> Forecast:
        simulation = _simulate(run, values, rows, option, device)
        return _forecast(run, rows, option, simulation, (device, rates))

    return forecast


def _simulate(
    run: RunConfig, values: dict[str, Any], rows: Rows, option: Option, device: Device
) -> Simulation:
    documents = few_lengths(rows.worst[option.micro_batch_size])
    shape = Shape((documents,), few_lengths(rows.eval_documents), rows.target_share)
    chosen = run.with_values(option.settings(), "planner")
    return simulate(chosen, values, shape, device=device.type)


def _forecast(
    run: RunConfig,
    rows: Rows,
    option: Option,
    simulation: Simulation,
    on: tuple[Device, Rates],
) -> Forecast:
    device, rates = on
    workspace = workspace_bytes(device)
    phases = {name: peak.plus(LIBRARIES, workspace) for name, peak in simulation.phases.items()}
    peak = highest(phases)
    return Forecast(
        option=option,
        phases=phases,
        needed_bytes=peak.bytes + margin_bytes(peak),
        host_bytes=simulation.host_base_bytes + simulation.paged_bytes + simulation.offloaded_bytes,
        paged_bytes=simulation.paged_bytes,
        step_seconds=_step_seconds(run, rows, option, simulation, rates),
        forward_share=_forward_share(simulation, rates),
        num_trainable=simulation.num_trainable,
        num_total=simulation.num_total,
    )


def _step_seconds(
    run: RunConfig, rows: Rows, option: Option, simulation: Simulation, rates: Rates
) -> float:
    """Forward and backward for every row of an average step, and one move of the optimizer."""
    num_passes = rows.passes_per_step(run.train.batch_size, option.micro_batch_size)
    num_tokens = rows.rows_per_step(run.train.batch_size) * rows.mean_row_tokens
    scale = num_tokens / num_passes / sum(rows.worst[option.micro_batch_size])
    work: Counter[Operation] = sum((simulation.work[phase] for phase in _PASS), Counter())
    one_pass = work_seconds(work, rates, scale=scale)
    # Inputs of layers travel beside the computation, pages after it; both there and back.
    one_pass = max(one_pass, scale * 2 * simulation.offloaded_bytes / rates.host_link)
    optimizer = work_seconds(simulation.work["optimizer"], rates)
    return num_passes * one_pass + optimizer + 2 * simulation.paged_bytes / rates.host_link


def _forward_share(simulation: Simulation, rates: Rates) -> float:
    forward, backward = (work_seconds(simulation.work[phase], rates) for phase in _PASS)
    return forward / (forward + backward)


def _short_lengths(values: dict[str, Any], fewest: int) -> tuple[int, int]:
    """Two numbers of layers that hold whole periods of the pattern of layers."""
    config = build_config(values)
    total = config.num_hidden_layers
    if not family_of(config).is_first_class:
        return total, total
    kinds = list(getattr(config, "layer_types", None) or [""] * total)
    period = next(p for p in range(1, total + 1) if kinds == (kinds[:p] * total)[:total])
    first = -(-fewest // period) * period
    return first, first + period


def _num_layers(values: dict[str, Any]) -> int:
    return build_config(values).num_hidden_layers


def _with_layers(values: dict[str, Any], count: int) -> dict[str, Any]:
    key = next((k for k in ("num_hidden_layers", "n_layer") if k in values), "num_hidden_layers")
    changed = {**values, key: count}
    if isinstance(values.get("layer_types"), list):
        changed["layer_types"] = values["layer_types"][:count]
    return changed


def _extended(first: Simulation, second: Simulation, times: float) -> Simulation:
    """`first` with `times` the difference of the two added to every figure."""

    def line(a: float, b: float) -> int:
        return round(a + times * (b - a))

    phases = {}
    for name, peak in first.phases.items():
        other = second.phases[name].parts
        parts = {
            part: line(peak.parts.get(part, 0), other.get(part, 0))
            for part in {**peak.parts, **other}
        }
        phases[name] = Peak(sum(parts.values()), parts)
    work = {}
    for phase, counted in first.work.items():
        difference = Counter(second.work[phase])
        difference.subtract(counted)
        work[phase] = Counter(
            {op: line(counted[op], counted[op] + n) for op, n in difference.items()}
        )
    return Simulation(
        phases=phases,
        host_base_bytes=line(first.host_base_bytes, second.host_base_bytes),
        paged_bytes=line(first.paged_bytes, second.paged_bytes),
        offloaded_bytes=line(first.offloaded_bytes, second.offloaded_bytes),
        work=work,
        num_trainable=line(first.num_trainable, second.num_trainable),
        num_total=line(first.num_total, second.num_total),
    )


def _share(numbers: list[int]) -> float:
    """Where the second of three numbers lies between the others; above 1 where beyond them."""
    low, middle, high = numbers
    return (middle - low) / (high - low) if high > low else 1.0


def _head_share(tokens: list[int], rows: Rows) -> float:
    """The same for the rows of logits that exist at once."""
    return _share([min(CHUNK_ROWS, max(1, round(rows.target_share * n))) for n in tokens])


def _widened(
    long: Simulation,
    short: Simulation,
    wide: Simulation,
    shares: tuple[float, float],
    rates: Rates,
) -> Simulation:
    """`long` with more rows a pass.

    Args:
        short: Few layers and as many rows as `long` has.
        wide: As many layers as `short` has and the most rows.
        shares: Where the tokens asked for lie between those two, above 1 where beyond them; and
            the same for the rows of logits that exist at once.
    """
    share, head_share = shares
    phases, work = dict(long.phases), dict(long.work)
    for name in _PASS:
        few, many = short.phases[name].parts, wide.phases[name].parts
        parts = {
            part: _grown(
                long.phases[name].parts.get(part, 0),
                few.get(part, 0),
                many.get(part, 0),
                head_share if part == HEAD else share,
            )
            for part in {**long.phases[name].parts, **many}
        }
        phases[name] = Peak(sum(parts.values()), parts)
        work[name] = _wider_work(long.work[name], short.work[name], wide.work[name], share, rates)
    offloaded = _grown(long.offloaded_bytes, short.offloaded_bytes, wide.offloaded_bytes, share)
    return replace(long, phases=phases, work=work, offloaded_bytes=offloaded)


def _wider_work(
    long: Counter[Operation],
    few: Counter[Operation],
    many: Counter[Operation],
    share: float,
    rates: Rates,
) -> Counter[Operation]:
    """`long` with more rows: FLOPs, bytes and seconds of a kind grow as from `few` to `many`."""
    few_sums, many_sums = _by_kind(few), _by_kind(many)

    def wider(work: Counter[Operation], share: float, factors: dict[str, float]) -> Counter:
        found: Counter[Operation] = Counter()
        for operation, count in work.items():
            kind, factor = operation.kind, factors.get(operation.kind, 1.0)
            pairs = zip(few_sums[kind], many_sums.get(kind, (0, 0)), strict=True)
            sizes = zip(operation[1:], pairs, strict=True)
            grown = [round(factor * _grown(size, *pair, share)) for size, pair in sizes]
            found[Operation(kind, *grown)] += count
        return found

    # A product of few rows waits for memory, one of many for arithmetic: sums do not tell that.
    grown, factors = wider(few, 1.0, {}), {}
    for kind in few_sums:
        ours, theirs = (_device_seconds(work, kind, rates) for work in (grown, many))
        factors[kind] = 1 + share * (theirs / ours - 1) if ours else 1.0
    return wider(long, share, factors)


def _grown(size: int, few: int, many: int, share: float) -> int:
    """`size` grown as a part of a short model grows."""
    return round(size * (1 + share * (many / few - 1))) if few else round(share * many)


def _device_seconds(work: Counter[Operation], kind: str, rates: Rates) -> float:
    of_kind = Counter({op: count for op, count in work.items() if op.kind == kind})
    return work_seconds(of_kind, replace(rates, seconds_per_kernel=0.0))


def _by_kind(work: Counter[Operation]) -> dict[str, tuple[int, int]]:
    """FLOPs and bytes of each kind of operation."""
    sums: dict[str, tuple[int, int]] = {}
    for operation, count in work.items():
        flops, num_bytes = sums.get(operation.kind, (0, 0))
        sums[operation.kind] = flops + count * operation.flops, num_bytes + count * operation.bytes
    return sums


def few_lengths(documents: Documents) -> Documents:
    """As many documents and tokens with few different lengths: a simulation goes through each.

    >>> few_lengths((3, 1, 2, 2))
    (3, 2, 2, 1)
    """
    ordered = sorted(documents, reverse=True)
    size = max(1, -(-len(ordered) // MOST_LENGTHS))
    found: list[int] = []
    for start in range(0, len(ordered), size):
        part = ordered[start : start + size]
        length, left = divmod(sum(part), len(part))
        found += [length + 1] * left + [length] * (len(part) - left)
    return tuple(found)
