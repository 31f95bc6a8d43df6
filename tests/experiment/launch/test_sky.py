"""The task for SkyPilot, and what its machines run."""

import pytest
import yaml

from nibble.errors import UsageError
from nibble.experiment.launch.sky import render

SKY = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}


@pytest.fixture
def job(make_job, machines):
    return make_job(
        machines.python,
        workdir=str(machines.work),
        device="A100-80GB",
        image="registry.example/nibble:1",
        storage="s3://bucket/path",
    )


def test_what_sky_is_asked_for(job):
    task = yaml.safe_load(render(job))
    assert task.pop("run")
    assert task == {
        "name": job.name,
        "num_nodes": 2,
        "resources": {
            "accelerators": {"A100-80GB": 2},
            "image_id": "docker:registry.example/nibble:1",
            "job_recovery": {"recover_on_exit_codes": [75]},
            "cpus": "16+",
            "memory": "64+",
        },
        "file_mounts": {job.workdir: {"source": "s3://bucket/path", "mode": "MOUNT_CACHED"}},
    }


def test_a_volume_and_no_more_than_was_asked_for(make_job):
    job = make_job(device="T4", storage="volume", cpus=None, memory_bytes=None)
    task = yaml.safe_load(render(job))
    assert task["volumes"] == {job.workdir: "volume"}
    assert not {"cpus", "memory"} & task["resources"].keys()


@pytest.mark.parametrize("device", ["A100 80GB", "24GiB"])
def test_a_device_that_is_not_spelt_as_sky_does(make_job, device):
    with pytest.raises(UsageError, match="not how SkyPilot writes a GPU"):
        render(make_job(device=device))


@pytest.mark.parametrize("rank", [0, 1])
def test_every_machine_gets_the_words_as_they_are(job, machines, rank):
    machines.environment.update(SKY, SKYPILOT_NODE_RANK=str(rank), SKYPILOT_NUM_GPUS_PER_NODE="2")
    machines.codes("75", "75")
    assert machines.run(yaml.safe_load(render(job))["run"]) == 75
    workdir, *meeting = machines.words(rank)[:4]
    assert (workdir, meeting) == (str(machines.work), ["2", "10.0.0.1", "29500"])
    assert machines.words(rank)[4:] == list(job.words[1:])
    assert not list(machines.folder.rglob("PWNED"))


def test_one_machine_meets_nobody(make_job):
    assert "export" not in render(make_job(device="T4", nodes=1))
