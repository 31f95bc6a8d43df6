"""The script for hosts that ssh reaches."""

import pytest

from nibble.experiment.launch.ssh import render


@pytest.fixture
def job(make_job, machines):
    hosts = ("me@gpu-0", "gpu-1")
    return make_job(machines.python, workdir=str(machines.work), hosts=hosts, port=4000)


def test_hosts_in_order_meet_at_the_first(job, machines):
    assert machines.run(render(job)) == 0
    assert sorted(machines.said("hosts").split()) == ["gpu-1", "me@gpu-0"]
    assert machines.words(0)[1:4] == machines.words(1)[1:4] == ["2", "gpu-0", "4000"]


def test_one_host_meets_nobody(make_job, machines):
    job = make_job(machines.python, workdir=str(machines.work), hosts=("gpu-0",), nodes=1)
    assert machines.run(render(job)) == 0
    assert machines.words(0)[1:4] == ["", "", ""]


def test_a_host_that_is_not_reached(job, machines):
    machines.codes("wait", "255")
    assert machines.run(render(job)) == 255
    assert machines.said("signal-0") == "TERM\n"
