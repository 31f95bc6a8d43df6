"""Public functions that span several rooms."""

from collections.abc import Collection

from nibble.config import RunConfig, check_named, check_run
from nibble.events import Emit
from nibble.plan.devices import Device
from nibble.plan.plan import Plan, concrete, make_plan
from nibble.train import folder, trainer
from nibble.train.job import open_keys
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
    was started with.

    Args:
        emit: Receives every event of the run, in order.
        anyway: Start even if the plan says that the run will not fit.
        allow_change: What may differ from the run that is continued: dotted keys of the config,
            or "base", "data", "tokenizer", "template", "rows".

    Raises:
        NibbleError: One of its kinds, each with an exit code; see `nibble.errors`.
    """
    check_run(run)
    with folder.hold(folder.folder_of(run)):
        return train_held(run, emit, anyway=anyway, allow_change=allow_change)


def train_held(
    run: RunConfig, emit: Emit, *, anyway: bool = False, allow_change: Collection[str] = ()
) -> Result:
    """`train` in a folder that the caller holds, with a run that was checked."""
    if run.out is None:
        run = run.with_values({"out": str(folder.folder_of(run))}, "default")
    out = folder.folder_of(run)
    earlier = folder.read_run(out)
    if earlier is not None:
        kept = _with_plan_of(earlier, run)
        is_same = not folder.changed_keys(earlier, kept)
        is_planned = folder.has_begun(out) or (is_same and folder.read_plan(out))
        if not open_keys(kept) and is_planned:
            return trainer.train(kept, emit, allow_change=allow_change)
    made, dataset = make_plan(run)
    if not made.fits and not anyway:
        raise made.error()
    return trainer.train(
        concrete(run, made.settings),
        emit,
        plan=made.to_dict(),
        dataset=dataset,
        allow_change=allow_change,
    )


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
