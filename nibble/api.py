"""Public functions that span several rooms."""

from nibble.config import RunConfig
from nibble.events import Emit
from nibble.plan.devices import Device
from nibble.plan.plan import Plan, concrete, make_plan
from nibble.train import folder, trainer
from nibble.train.job import check_named, check_run, open_keys


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
    run: RunConfig, emit: Emit = lambda event: None, *, anyway: bool = False
) -> trainer.Result:
    """Train as `run` says, or continue what stands in its folder.

    `auto` values are planned for this device first; a run that is continued keeps the values it
    was started with.

    Args:
        emit: Receives every event of the run, in order.
        anyway: Start even if the plan says that the run will not fit.

    Raises:
        NibbleError: One of its kinds, each with an exit code; see `nibble.errors`.
    """
    check_run(run)
    if run.out is None:
        run = run.with_values({"out": str(folder.folder_of(run))}, "default")
    run = _with_earlier_plan(run)
    is_planned = bool(folder.read_plan(folder.folder_of(run)))
    if is_planned and not open_keys(run):
        return trainer.train(run, emit)
    made, dataset = make_plan(run)
    if not made.fits and not anyway:
        raise made.error()
    return trainer.train(concrete(run, made.settings), emit, plan=made.to_dict(), dataset=dataset)


def _with_earlier_plan(run: RunConfig) -> RunConfig:
    """The run with what was planned when its folder was made, where it leaves that open."""
    earlier = folder.read_run(folder.folder_of(run))
    if earlier is None:
        return run
    flat = run.flat()
    kept = {
        key: value
        for key, value in earlier.flat().items()
        if earlier.origin(key) == "planner"
        and (flat[key] == "auto" or run.origin(key) == "default")
    }
    return run.with_values(kept, "planner")
