"""The batch script: what it asks Slurm for, and when it goes back into the queue."""

import pytest

from nibble.errors import UsageError
from nibble.experiment.launch.slurm import render


@pytest.fixture
def script(make_job, machines):
    return render(make_job(machines.python, workdir=str(machines.work)))


def asked(script):
    """What stands in the comments that Slurm reads."""
    lines = [line for line in script.splitlines() if line.startswith("#SBATCH ")]
    return dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines)


@pytest.mark.parametrize(
    ("codes", "is_requeued"),
    [(("75", "75"), True), (("0", "0"), False), (("65", "75"), False), (("75", "77"), False)],
)
def test_75_goes_back_into_the_queue(script, machines, codes, is_requeued):
    machines.codes(*codes)
    machines.run(script)
    assert machines.said("requeued") == ("requeue 4711\n" if is_requeued else "")


def test_the_end_of_the_time_goes_back_into_the_queue(script, machines):
    machines.codes("wait", "wait")
    process = machines.start(script)
    machines.until("began-0", "began-1")
    assert machines.stop(process) == 75
    assert machines.said("requeued") == "requeue 4711\n"


@pytest.mark.parametrize("state", ["COMPLETING\n", ""])
def test_a_job_that_was_cancelled_does_not(script, machines, state):
    (machines.notes / "state").write_text(state)
    machines.codes("75", "75")
    assert machines.run(script) == 75
    assert not machines.said("requeued")


def test_every_machine_has_a_step(script, machines):
    machines.run(script)
    steps = machines.said("srun").split()
    assert sorted(word for word in steps if "nodelist" in word) == [
        "--nodelist=gpu-0",
        "--nodelist=gpu-1",
    ]
    assert steps.count("--cpus-per-task=16") == 2


def test_other_machines_than_asked_for(script, machines):
    machines.environment["SLURM_JOB_NODELIST"] = "gpu-0"
    assert machines.run(script) == 69


def test_one_machine_meets_nobody(make_job, machines):
    machines.environment["SLURM_JOB_NODELIST"] = "gpu-0"
    job = make_job(machines.python, workdir=str(machines.work), nodes=1)
    assert machines.run(render(job)) == 0
    assert machines.words(0)[1:4] == ["", "", ""]


def test_what_slurm_is_asked_for(make_job):
    assert asked(render(make_job())) == {
        "job-name": "nibble-first-0123abcd",
        "nodes": "2",
        "ntasks-per-node": "1",
        "gpus-per-node": "2",
        "cpus-per-task": "16",
        "mem": "65536M",
        "time": "8:00:00",
        "signal": "B:TERM@120",
        "dependency": "singleton",
        "open-mode": "append",
        "output": "nibble-first-0123abcd-%j.out",
        "requeue": "",
    }


def test_a_slow_stop_is_asked_for_earlier(make_job):
    assert asked(render(make_job(stop_seconds=600)))["signal"] == "B:TERM@660"


def test_a_time_in_which_nothing_could_be_trained(make_job):
    with pytest.raises(UsageError, match="the last 120 s are kept"):
        render(make_job(seconds=120))
    assert "time" not in asked(render(make_job(seconds=None)))


def test_a_little_memory_is_not_all_of_it(make_job):
    """Slurm reads 0 as all that a machine has."""
    assert asked(render(make_job(memory_bytes=1)))["mem"] == "1M"
