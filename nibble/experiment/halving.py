"""Successive halving: at each rung the better half goes on.

    rung 1   a quarter of the steps   the half with the lower held-out loss goes on
    rung 2   half of them             again
    end      all of them

Every run waits at a rung until all have come to it, so what is decided depends on losses alone and
not on which run was quicker.

Source: Jamieson and Talwalkar 2016, arXiv:1502.07943, with a factor of two.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from nibble.errors import UsageError
from nibble.experiment.grid import Trial

FRACTIONS = (4, 2)


@dataclass(frozen=True)
class Verdict:
    """What the losses so far decide.

    Attributes:
        lost: The rung at which a run was left behind, by run.
        rung: The step at which the others wait for each other; None is their end.
    """

    lost: dict[str, int]
    rung: int | None


def with_rungs(trials: Sequence[Trial]) -> tuple[list[Trial], list[int]]:
    """The trials, with the held-out loss measured at the rungs, and these.

    Raises:
        UsageError: If there are fewer than two trials, nothing is held out, or the numbers of
            steps differ, are not given or have no rungs.
    """
    if len(trials) < 2:
        raise UsageError("--halving needs two runs or more", fix="sweep over more values")
    found: list[Trial] = []
    rungs: set[tuple[int, ...]] = set()
    for trial in trials:
        steps, every = trial.run.train.steps, trial.run.train.eval_every
        if not trial.run.data.eval:
            raise UsageError(
                f"--halving compares held-out losses, and data.eval of {trial.name} is not set",
                fix="set data.eval to a file or to a fraction such as 0.05",
            )
        if steps is None:
            raise UsageError(
                "--halving needs train.steps, the same for all runs", fix="--set train.steps=200"
            )
        every = every or max(1, steps // FRACTIONS[0])
        rungs.add(_rungs(steps, every))
        run = trial.run.with_values({"train.eval_every": every}, "planner")
        found.append(Trial(trial.name, trial.settings, run))
    if len(rungs) > 1 or len({trial.run.train.steps for trial in trials}) > 1:
        raise UsageError(
            "--halving needs the same train.steps and train.eval_every for all runs",
            fix="sweep over other keys",
        )
    (chosen,) = rungs
    if not chosen:
        raise UsageError(
            "--halving needs a held-out loss before half of the steps",
            fix="lower train.eval_every or raise train.steps",
        )
    return found, list(chosen)


def decide(
    losses: Mapping[str, Mapping[int, float]], rungs: Sequence[int], failed: Collection[str] = ()
) -> Verdict:
    """Who is left behind, and where the others wait.

    Args:
        losses: By run, in order: its held-out loss by step; of equal ones the earlier run wins.
        rungs: Steps, in order.
        failed: Runs that get no further: none waits for them.
    """
    alive, lost = list(losses), dict[str, int]()
    for rung in rungs:
        alive = [name for name in alive if name not in failed or rung in losses[name]]
        if any(rung not in losses[name] for name in alive):
            return Verdict(lost, rung)
        ranked = sorted(alive, key=lambda name: losses[name][rung])
        behind = ranked[(len(ranked) + 1) // 2 :]
        lost.update(dict.fromkeys(behind, rung))
        alive = [name for name in alive if name not in behind]
    return Verdict(lost, None)


def _rungs(steps: int, every: int) -> tuple[int, ...]:
    """A quarter and half of the steps, each at the evaluation before it."""
    found = {steps // fraction // every * every for fraction in FRACTIONS}
    return tuple(sorted(found - {0}))
