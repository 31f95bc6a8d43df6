"""What a run is: `RunConfig` and its sections; the one place where a default stands.

    load_config("recipe.yaml")                          a file
    load_config("recipe.yaml", ["optim.lr=1e-4"])       a file and overrides
    load_config(None, ["model.name=...", "..."])        overrides alone

Every field carries its sentence; the command line, the schema, the documentation and the
studio read the same sentence. Unknown keys are errors.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    StringConstraints,
    ValidationError,
)
from pydantic_core import PydanticCustomError

from nibble import yamlfile
from nibble.config_errors import explain_all, sections, short
from nibble.errors import UsageError

INTERVAL = re.compile(r"^([1-9][0-9]{0,5})(s|min|h)$")
Count = Annotated[int, Field(ge=1, le=1_000_000)]


def _time(value: Any) -> Any:
    if not isinstance(value, str) or INTERVAL.fullmatch(value) is None:
        raise PydanticCustomError("time", "Input should be a time such as 30s, 10min or 2h")
    return value


Interval = Annotated[str, StringConstraints(pattern=INTERVAL.pattern), BeforeValidator(_time)]
Names = Annotated[list[str], Field(min_length=1)]


def _field(default: Any, memory: str = "", **limits: Any) -> Any:
    """A field with its default, its limits and its effect on memory."""
    return Field(default, json_schema_extra={"memory": memory or "none"}, **limits)


# The keys, or sections of them, that a method does not read.
_UNUSED_BY = {
    "lora": ("quant.",),
    "full": ("quant.", "lora.", "optim.lora_plus_ratio", "train.shard"),
}


class Section(BaseModel):
    """A frozen part of the config that refuses unknown keys."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )


class ModelConfig(Section):
    """The base model."""

    name: str = _field("", "sets it: every weight of the base is resident")
    """Hub id or local folder in the transformers layout."""
    revision: str | None = _field(None)
    """Branch, tag or commit of a hub id; null is the newest."""
    dtype: Literal["bfloat16", "float32"] = _field("bfloat16", "float32 doubles activations")
    """Type of the 16-bit base and of every product; float32 for exact checks."""
    embeddings: Literal["auto", "device", "host"] = _field(
        "auto", "host takes the table of embeddings off the device"
    )
    """Where token embeddings are looked up; host is for frozen ones that are not the head too."""


class QuantConfig(Section):
    """How QLoRA stores the base."""

    type: Literal["nf4", "fp4"] = _field("nf4")
    """4-bit code: NF4 (quantiles of a normal distribution) or FP4 (a 4-bit float)."""
    block_size: Literal[64, 128, 256, 512, 1024, 2048, 4096] = _field(
        64, "larger blocks store fewer scales: 0.5 bit a weight at 64 without double"
    )
    """Weights that share one scale."""
    double: bool = _field(True, "saves 0.37 bit a weight")
    """Store the scales in 8 bits as well (double quantisation)."""
    search: bool = _field(False, "none; loading an 8B takes 4 minutes more on one core")
    """Search block scales of least squared error; a base stored in 4 bits already keeps its own."""


class LoraConfig(Section):
    """The low-rank update."""

    rank: int = _field(16, "16 bytes a trained value: weight, gradient, two moments", ge=1, le=4096)
    """Rank R of the update, from 1 to 4096."""
    alpha: float = _field(32, gt=0)
    """Numerator of the scale: the update is multiplied by alpha / rank."""
    dropout: float = _field(0.0, "above 0 keeps a second input per layer", ge=0, lt=1)
    """Probability of zeroing an input of A, in [0, 1)."""
    target: Literal["all-linear"] | Names = _field("all-linear", "fewer targets, fewer factors")
    """Layers to adapt: all-linear (the head excepted) or a list of name suffixes."""
    dtype: Literal["float32", "bfloat16"] = _field("float32", "bfloat16 halves the factors")
    """Type of the stored factors; products run in model.dtype."""
    rslora: bool = _field(False)
    """Scale by alpha / sqrt(rank) instead of alpha / rank."""


class DataConfig(Section):
    """Examples, and how they become rows."""

    train: str | Names = _field("")
    """File or hub id with training examples, or a list of them."""
    eval: str | Annotated[float, Field(gt=0, lt=1)] | None = _field(None)
    """Held-out examples: a file, a hub id, or the fraction of train to hold out, in (0, 1)."""
    format: Literal["auto", "messages", "alpaca", "sharegpt", "prompt-completion", "text"] = _field(
        "auto"
    )
    """How a row is read; auto decides by its columns and says so."""
    max_seq_len: int = _field(2048, "activations grow with it", ge=8, le=1_048_576)
    """Tokens in a row, at least 8."""
    packing: bool = _field(True, "rows are full: activations at their largest")
    """Lay several documents in one row; they never see each other."""
    train_on: Literal["assistant", "last", "all"] = _field("assistant")
    """Tokens that carry loss: assistant turns, the last of them, or everything."""
    on_bad_row: Literal["stop", "skip"] = _field("stop")
    """A row that cannot be read: stop, or skip it and list it."""
    on_long_row: Literal["truncate", "drop", "stop"] = _field("truncate")
    """A row longer than max_seq_len: cut its end, drop it, or stop; counted and reported."""


class TrainConfig(Section):
    """The loop."""

    epochs: float = _field(1, gt=0, le=10_000)
    """Passes over the training rows; fractions are allowed."""
    steps: Annotated[int, Field(ge=1, le=100_000_000)] | None = _field(None)
    """Optimizer steps; overrides epochs."""
    batch_size: Count = _field(16)
    """Rows per optimizer step over all devices."""
    micro_batch_size: Count | Literal["auto"] = _field(
        "auto", "activations grow with it", union_mode="left_to_right"
    )
    """Rows per forward pass; the rest of the batch is accumulated."""
    recompute: Literal["auto", "none", "selective", "full", "offload", "tiled"] = _field(
        "auto",
        "full keeps one input per layer instead of all activations, offload two in all; tiled "
        "lets the widest part of a layer work on 512 tokens at a time",
    )
    """Activations that are computed again in the backward pass instead of kept."""
    exactness: Literal["default", "exact"] = _field("default")
    """exact allows deterministic operations only."""
    shard: bool = _field(False, "of several devices each keeps its part of the base")
    """Cut the frozen base over the devices of a run; each layer is gathered when it is used."""
    seed: int = _field(0, ge=0, lt=2**63)
    """Seed of the adapters, the order of rows and dropout."""
    eval_every: Annotated[int, Field(ge=1)] | None = _field(None)
    """Steps between evaluations; null evaluates at the start and at the end."""
    save_every: Count | Interval = _field("10min")
    """Steps, or a time such as 30s, 10min or 2h, between checkpoints."""
    stop_within: Interval = _field("25s")
    """Time that SIGTERM gives the step at work to finish and be saved before the process ends."""


class OptimConfig(Section):
    """AdamW and its schedule."""

    name: Literal["adamw", "adamw8bit"] = _field("adamw", "adamw8bit: 2 instead of 8 bytes a value")
    """Optimizer: AdamW with 32-bit or 8-bit moments."""
    paged: bool | Literal["auto"] = _field("auto", "moments take two pages, of 2 or 8 MiB")
    """Keep the moments in pages of host memory that come to the device one after the other."""
    lr: float = _field(2e-4, gt=0, le=10)
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = _field("cosine")
    """Course of the learning rate after warm-up; cosine and linear end at 0."""
    warmup: float = _field(0.03, ge=0, le=1)
    """Fraction of the steps over which the learning rate rises from 0, in [0, 1]."""
    weight_decay: float = _field(0.0, ge=0, le=10)
    """Decoupled weight decay, multiplied by the learning rate."""
    max_grad_norm: float = _field(1.0, gt=0)
    """Gradients are scaled down to this norm."""
    lora_plus_ratio: float = _field(1.0, gt=0, le=1000)
    """Learning rate of B over that of A (LoRA+)."""


class RunConfig(Section):
    """Everything that decides a run."""

    method: Literal["auto", "lora", "qlora", "full"] = _field(
        "auto", "the base takes 2 bytes a weight (lora), 0.52 (qlora) or 16 (full)"
    )
    """lora, qlora, full, or auto: decided for this device, with the reason."""
    out: str | None = _field(None)
    """Folder of the run; null is runs/<model>-<method>."""
    model: ModelConfig = ModelConfig()
    quant: QuantConfig = QuantConfig()
    lora: LoraConfig = LoraConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    def origin(self, key: str) -> str:
        """Where the value of a dotted key came from: default, file, flag or planner."""
        return self._origins.get(key, "default")

    def flat(self) -> dict[str, Any]:
        """Every dotted key with its value."""
        return flatten(self.model_dump())

    def with_values(self, values: Mapping[str, Any], origin: str) -> "RunConfig":
        """A copy in which the dotted keys of `values` have new values from `origin`."""
        merged = self.model_dump()
        for key, value in values.items():
            _set(merged, key, value)
        run = _validate(merged, {})
        run._origins.update(self._origins, **dict.fromkeys(values, origin))
        return run


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that a YAML file and `section.key=value` overrides describe.

    Raises:
        UsageError: If a key is unknown, a value is out of range, or the file is not YAML.
    """
    values, lines = yamlfile.read(Path(path)) if path is not None else ({}, {})
    places = {key: f"{path}:{line}: " for key, line in lines.items()}
    origins = dict.fromkeys(flatten(values), "file")
    for override in overrides:
        key, value = _split_override(override)
        _set(values, key, value)
        places.pop(key, None)
        origins[key] = "flag"
    run = _validate(values, places)
    run._origins.update(origins)
    return run


def keys() -> dict[str, Any]:
    """Every dotted key with its pydantic field, in the order of the classes."""
    found: dict[str, Any] = {}
    for name, field in RunConfig.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            section = field.annotation.model_fields
            found.update({f"{name}.{key}": inner for key, inner in section.items()})
        else:
            found[name] = field
    return found


def describe(key: str) -> tuple[str, str]:
    """What a dotted key takes, as JSON Schema says it, and its effect on memory."""
    section, _, name = key.rpartition(".")
    schema = RunConfig.model_json_schema()
    owner = schema["$defs"][f"{section.capitalize()}Config"] if section else schema
    values = owner["properties"][name]
    hidden = ("title", "description", "memory", "default")
    limits = {k: v for k, v in values.items() if k not in hidden}
    return json.dumps(limits), values.get("memory", "none")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def check_named(run: RunConfig) -> None:
    """Refuse a run without a model.

    Raises:
        UsageError: If model.name is not set.
    """
    if not run.model.name:
        raise UsageError("model.name is not set", fix="give --model or set it in the recipe")


def check_run(run: RunConfig) -> None:
    """Refuse a run that lacks a key, or has one that does nothing without another.

    Raises:
        UsageError: It says which.
    """
    check_named(run)
    if not run.data.train:
        raise UsageError("data.train is not set", fix="give --data or set it in the recipe")
    if run.train.eval_every is not None and not run.data.eval:
        raise UsageError(
            f"train.eval_every={run.train.eval_every} needs data.eval, which is not set",
            fix="set data.eval to a file or to a fraction such as 0.05",
        )
    size, most = run.train.micro_batch_size, run.train.batch_size
    is_planned = run.origin("train.micro_batch_size") == "planner"
    if isinstance(size, int) and size > most and not is_planned:
        raise UsageError(
            f"train.micro_batch_size={size} is more than train.batch_size={most}, its upper bound",
            fix="lower it, leave it auto, or raise train.batch_size",
        )


def unused_keys(run: RunConfig) -> list[str]:
    """Keys that are set to something although the rest of the run has no use for them."""
    unused = _UNUSED_BY.get(run.method, ())
    if run.train.steps is not None:
        unused = (*unused, "train.epochs")
    flat, defaults = run.flat(), RunConfig().flat()
    return [key for key in flat if key.startswith(unused) and flat[key] != defaults[key]]


def _split_override(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")):
        raise UsageError(
            f"--set {short(override)} is not of the form section.key=value",
            fix="write for example --set optim.lr=1e-4",
        )
    inner = sections(keys()).get(key)
    if inner is not None:
        raise UsageError(
            f"--set {short(override)}: {key} is a section, not a key",
            fix=f"set its keys one by one, such as {inner}",
        )
    return key, yamlfile.parse_value(text)


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        inner = values.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise UsageError(
                f"--set {short(key)}: {parent} is {short(inner)}, not a section of the config",
                fix="`nibble explain` lists every key",
            )
        values = inner
    values[last] = value


def _validate(values: dict[str, Any], places: Mapping[str, str]) -> RunConfig:
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        problems = explain_all(error, keys(), places)
        raise UsageError(
            "\n".join(problems), fix="`nibble explain KEY` says what a key takes"
        ) from None


def interval_seconds(text: str, name: str) -> int:
    """A time such as "15min" in seconds; `name` says in an error whose value it is.

    >>> interval_seconds("15min", "--billing")
    900

    Raises:
        UsageError: If it is none.
    """
    match = INTERVAL.fullmatch(text)
    if match is None:
        raise UsageError(
            f"{name} {text!r} is no time, expected a number with s, min or h",
            fix=f"write 15min, for example, for {name}",
        )
    return int(match[1]) * {"s": 1, "min": 60, "h": 3600}[match[2]]
