"""Public functions that span several rooms."""

import json
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from nibble.adapter.certificate import Certificate
from nibble.adapter.config import adapter_folder, read_adapter_config
from nibble.adapter.merge import Merge, base_options_of
from nibble.adapter.merge import merge as merge_job
from nibble.config import DataConfig, RunConfig, check_named, check_run
from nibble.data.dataset import Dataset, build_dataset
from nibble.data.packing import Row
from nibble.errors import DataError, UnavailableError, UsageError
from nibble.events import Emit
from nibble.model.files import find_tokenizer
from nibble.model.tokenizer import load_tokenizer
from nibble.plan.devices import Device
from nibble.plan.plan import Plan, concrete, make_plan
from nibble.train import folder, trainer
from nibble.train.build import base_options
from nibble.train.distributed import Ranks, joined
from nibble.train.job import open_keys
from nibble.train.launch import place_here
from nibble.train.manifest import versions
from nibble.train.result import Result


def plan(run: RunConfig, device: Device | str = "here") -> Plan:
    """LoRA or QLoRA on this device, and with which settings; nothing is loaded or run.

    Args:
        run: The run; what is `auto` in it is chosen. The model may be a folder, a hub id or a
            preset such as "llama-2-7b".
        device: A name such as "RTX 4090", an amount of memory such as "24GiB", "cpu" or "here".

    Raises:
        NibbleError: One of its kinds, each with an exit code; see `nibble.errors`.
    """
    check_named(run)
    return make_plan(run, device)[0]


def train(
    run: RunConfig,
    emit: Emit = lambda event: None,
    *,
    anyway: bool = False,
    allow_change: Collection[str] = (),
) -> Result:
    """Train as `run` says, or continue what stands in its folder.

    `auto` values are planned for this device first; a run that is continued keeps the values it
    was started with. In a process that torchrun started, with the others of its run: each calls
    this with the same arguments, and the first one writes.

    Args:
        emit: Receives every event of the run, in order; of several processes, in the first.
        anyway: Start even if the plan says that the run will not fit.
        allow_change: What may differ from the run that is continued: dotted keys of the config,
            or "base", "data", "tokenizer", "template", "rows".

    Raises:
        NibbleError: One of its kinds, each with an exit code; see `nibble.errors`.
    """
    check_run(run)
    is_first = place_here().rank == 0
    with folder.hold(folder.folder_of(run)) if is_first else nullcontext():
        return train_held(run, emit, anyway=anyway, allow_change=allow_change)


def train_held(
    run: RunConfig, emit: Emit, *, anyway: bool = False, allow_change: Collection[str] = ()
) -> Result:
    """`train` in a folder that the caller holds, with a run that was checked."""
    if run.out is None:
        run = run.with_values({"out": str(folder.folder_of(run))}, "default")
    with joined() as ranks:
        ranks.check_same(versions(), UnavailableError, "code")
        given = {key: json.dumps(value) for key, value in run.flat().items() if key != "out"}
        changes = {"--allow-change": " ".join(sorted(allow_change))}
        ranks.check_same({**given, **changes}, DataError, "configs")
        plan, dataset = None, None
        if ranks.is_first:
            run, plan, dataset = _planned(run, ranks, anyway=anyway)
        run = _as_first(run, ranks)
        return trainer.train(
            run, emit, plan=plan, dataset=dataset, allow_change=allow_change, ranks=ranks
        )


def merge(
    adapter: str | Path,
    out: str | Path,
    *,
    model: str = "",
    onto: str = "auto",
    data: str = "",
    options: Mapping[str, Any] | None = None,
    anyway: bool = False,
    tell: Callable[[str], None] = lambda what: None,
) -> Certificate:
    """Write a model with an adapter merged in, measured against base and adapter.

    Args:
        adapter: An adapter folder, or the folder of its run.
        out: A new or empty folder.
        model: Folder or hub id of the base; empty takes what the adapter names.
        onto: "16bit", "dequantized" (the 4-bit base that QLoRA trains on), "4bit", "4bit-search",
            or "auto": the one with the lowest held-out loss.
        data: Held-out examples; empty takes those of the run that the adapter stands in. Without
            any, nothing is measured, and "auto" is what the adapter was trained on.
        options: Arguments of `load_base` that say how the base was kept in training, where the
            adapter does not.
        anyway: Keep a model that is outside the bounds.
        tell: Receives what is done next, for a person.

    Raises:
        AdapterError: If the adapter is broken, or rounding or another base loses what it learnt.
        NibbleError: Another of its kinds; see `nibble.errors`.
    """
    place = adapter_folder(Path(adapter))
    run = folder.read_run(place.parent)
    config = read_adapter_config(place)
    if not (model or config.base):
        raise UsageError(f"{place} does not name its base", fix="give the base: --model")
    kept = ("storage", "dtype", "quant")
    known = {} if run is None else {key: base_options(run)[key] for key in kept}
    job = Merge(
        place,
        model or config.base,
        None if model else config.revision,
        base_options_of(place, known, options or {}),
    )
    job = replace(job, rows=_held_out(job, run, data))
    return merge_job(job, Path(out), onto, anyway=anyway, tell=tell)


def _held_out(job: Merge, run: RunConfig | None, data: str) -> list[Row]:
    """Held-out rows: of a file, or of the run."""
    if not data and (run is None or not run.data.eval):
        return []
    tokenizer = load_tokenizer(find_tokenizer(job.model))
    if data:
        section = DataConfig() if run is None else run.data
        changed = {"train": data, "eval": None, "packing": False}
        return build_dataset(section.model_copy(update=changed), tokenizer, seed=0).train
    assert run is not None, "there is a run"
    return build_dataset(run.data, tokenizer, seed=run.train.seed).eval


def _planned(
    run: RunConfig, ranks: Ranks, *, anyway: bool
) -> tuple[RunConfig, dict[str, Any] | None, Dataset | None]:
    """The run with concrete values; the plan and the data set, where it had to be planned."""
    out = folder.folder_of(run)
    earlier = folder.read_run(out)
    if earlier is not None:
        kept = _with_plan_of(earlier, run)
        is_same = not folder.changed_keys(earlier, kept)
        is_planned = folder.has_begun(out) or (is_same and folder.read_plan(out))
        if not open_keys(kept) and is_planned:
            return kept, None, None
    made, dataset = make_plan(run)
    num_shards = ranks.world_size if run.train.shard else 1
    if not (made.fits or made.fits_in_shards(num_shards) or anyway):
        raise made.error()
    return concrete(run, made.settings), made.to_dict(), dataset


def _as_first(run: RunConfig, ranks: Ranks) -> RunConfig:
    """The run as rank 0 planned it, with the origins of its values."""
    if ranks.is_alone:
        return run
    values, origins = ranks.of_first([run.flat(), {key: run.origin(key) for key in run.flat()}])
    taken = run.with_values(values, "planner")
    taken._origins.update(origins)
    return taken


def _with_plan_of(earlier: RunConfig, run: RunConfig) -> RunConfig:
    """The run with what was planned when its folder was made, where it leaves that open."""
    flat = run.flat()
    kept = {
        key: value
        for key, value in earlier.flat().items()
        if earlier.origin(key) == "planner"
        and (flat[key] == "auto" or run.origin(key) == "default")
    }
    return run.with_values(kept, "planner")
