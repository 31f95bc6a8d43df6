"""The runs of a sweep that cost nothing: see stub_run.py."""

import sys
from pathlib import Path

from nibble.experiment.grid import grid_trials
from nibble.experiment.placement import Need
from nibble.experiment.record import Planned

STUB = (sys.executable, str(Path(__file__).with_name("stub_run.py")), "train")


def stub_runs(rates, needs, *overrides, steps=12):
    """A run for each learning rate, which takes so much memory."""
    given = ["model.name=m", "data.train=d", "data.eval=e", "method=lora", f"train.steps={steps}"]
    axis = "optim.lr=" + ",".join(map(str, rates))
    trials = grid_trials(None, [axis], [*given, *overrides])
    return [Planned(t, t.run, Need(n)) for t, n in zip(trials, needs, strict=True)]
