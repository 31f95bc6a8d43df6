"""What each run of a sweep takes of a device, and with which settings: its plan."""

import json
from collections.abc import Iterable, Sequence

from nibble.config import RunConfig
from nibble.errors import NibbleError
from nibble.experiment.grid import Trial
from nibble.experiment.placement import Need
from nibble.experiment.record import Planned
from nibble.plan.budget import budget_bytes
from nibble.plan.devices import Device, with_measured_rates
from nibble.plan.plan import Plan, concrete, make_plan

# Private memory of a process with torch and transformers, beside what a plan counts. Source: 270
# MiB after the imports and 37 more after the first load, measured with torch 2.13 on Linux.
PROCESS_BYTES = 320 * 2**20
# What a plan does not look at: runs that differ in these alone have one plan.
_UNPLANNED = {
    *("out", "optim.lr", "optim.schedule", "optim.warmup", "optim.weight_decay"),
    *("optim.max_grad_norm", "optim.lora_plus_ratio", "lora.alpha", "lora.rslora"),
    *("train.eval_every", "train.save_every", "train.stop_within", "quant.search"),
}


def plan_trials(
    trials: Sequence[Trial], device: Device, known: Iterable[Planned] = ()
) -> list[Planned]:
    """Each run with what its plan for the device has chosen and needs.

    A run that does not fit, or whose model or data cannot be used, carries the reason.

    Args:
        known: Those that were planned before.

    Raises:
        NibbleError: If no run can be planned: what is wrong with the first.
    """
    found = {one.trial.name: one for one in known}
    open_trials = [trial for trial in trials if trial.name not in found]
    plans = _plans(open_trials, with_measured_rates(device))
    errors = [plan for plan in plans if isinstance(plan, NibbleError)]
    if errors and len(errors) == len(trials):
        raise errors[0]
    for trial, plan in zip(open_trials, plans, strict=True):
        found[trial.name] = _planned(trial, plan, device)
    return [found[trial.name] for trial in trials]


def _plans(trials: Sequence[Trial], device: Device) -> list[Plan | NibbleError]:
    """The plan of each trial; where the plans may choose the method, they choose the same."""
    runs = [trial.run for trial in trials]
    plans = _each_planned(runs, device)
    chosen = {plan.method for plan in plans if isinstance(plan, Plan)}
    if len(chosen) > 1 and all(run.method == "auto" for run in runs):
        for method in sorted(chosen):
            asked = [run.with_values({"method": method}, "planner") for run in runs]
            again = _each_planned(asked, device)
            if all(plan.fits for plan in again if isinstance(plan, Plan)):
                return again
    return plans


def _each_planned(runs: Sequence[RunConfig], device: Device) -> list[Plan | NibbleError]:
    plans: dict[str, Plan | NibbleError] = {}
    for run in runs:
        if _key(run) not in plans:
            plans[_key(run)] = _plan(run, device)
    return [plans[_key(run)] for run in runs]


def need_of(plan: Plan, device: Device) -> Need:
    """What a run takes of its device and of the machine around that, its process included."""
    beside = device.memory_bytes - budget_bytes(device)
    if device.type == "cpu":
        return Need(plan.needed_bytes + PROCESS_BYTES + beside)
    return Need(plan.needed_bytes + beside, plan.host_memory_bytes + PROCESS_BYTES)


def _plan(run: RunConfig, device: Device) -> Plan | NibbleError:
    try:
        return make_plan(run, device)[0]
    except NibbleError as error:
        return error


def _planned(trial: Trial, plan: Plan | NibbleError, device: Device) -> Planned:
    if isinstance(plan, NibbleError):
        reason = f"{plan.what}; {plan.fix}" if plan.fix else plan.what
        return Planned(trial, trial.run, Need(0), plan.exit_code, reason)
    if not plan.fits:
        code = plan.error().exit_code
        return Planned(trial, trial.run, Need(plan.needed_bytes), code, plan.reasons[0])
    return Planned(trial, concrete(trial.run, plan.settings), need_of(plan, device))


def _key(run: RunConfig) -> str:
    planned = {k: (v, run.origin(k)) for k, v in run.flat().items() if k not in _UNPLANNED}
    return json.dumps(planned)
