"""A sweep of eight stub runs on four devices that are not there, in a process that may be killed.

python sweep_process.py OUT; see test_sweep.py.
"""

import sys
from pathlib import Path

from stub_runs import STUB, stub_runs

from nibble.experiment import engine, ranking, record, sweep
from nibble.experiment.machine import Machine
from nibble.experiment.placement import Place
from nibble.train.interrupt import stop_signals

PLACES = [Place(f"gpu{number}", 100) for number in range(4)]
RATES = [0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08]
NEEDS = [60, 30, 30, 90, 20, 50, 40, 70]


def main(out):
    engine.TRAIN = STUB
    planned = stub_runs(RATES, NEEDS)
    with stop_signals() as stop, record.hold(out):
        record.write_record(out, planned, has_halving=False)
        rows = sweep.run_sweep(out, planned, Machine(lambda: PLACES), stop=stop)
        ranking.write_ranking(out, ranking.rank(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
