"""Public functions that span several rooms."""

from nibble.config import RunConfig
from nibble.errors import UsageError
from nibble.events import Emit
from nibble.plan.resolve import resolve
from nibble.train import folder, trainer


def train(run: RunConfig, emit: Emit = lambda event: None) -> trainer.Result:
    """Train as `run` says, or continue what stands in its folder.

    `auto` values are resolved for this device first; a run that is continued keeps the values it
    was started with.

    Args:
        emit: Receives every event of the run, in order.

    Raises:
        NibbleError: One of its kinds, each with an exit code; see `nibble.errors`.
    """
    if not run.model.name:
        raise UsageError("model.name is not set", fix="give --model or set it in the recipe")
    earlier = folder.read_run(folder.folder_of(run))
    if earlier is not None:
        flat = earlier.flat()
        planned = {key: flat[key] for key in flat if earlier.origin(key) == "planner"}
        autos = {key: value for key, value in planned.items() if run.flat()[key] == "auto"}
        run = run.with_values(autos, "planner")
    resolved, reasons = resolve(run)
    if run.out is None:
        resolved = resolved.with_values({"out": str(folder.folder_of(run))}, "default")
    return trainer.train(resolved, emit, reasons=reasons)
