"""The documents for Kubernetes, read as it reads them."""

import re

import pytest
import yaml

from nibble.errors import UsageError
from nibble.experiment.launch.kubernetes import render

from .conftest import UGLY


def documents(job):
    return list(yaml.safe_load_all(render(job)))


def expanded(word, environment):
    """A word of a command as Kubernetes hands it on: $(NAME) is replaced, $$ is a dollar."""

    def replaced(match):
        text = match[0]
        return "$" if text == "$$" else environment.get(text[2:-1], text)

    return re.sub(r"\$\$|\$\([A-Za-z0-9_.-]+\)", replaced, word)


@pytest.fixture
def job(make_job):
    return make_job(image=f"i{UGLY}", storage="claim")


def test_words_arrive_as_they_are(job):
    container = documents(job)[1]["spec"]["template"]["spec"]["containers"][0]
    words = [expanded(word, {"PET_NNODES": "2", "HOME": "/"}) for word in container["command"]]
    assert words == list(job.words)
    assert container["image"] == job.image
    assert container["workingDir"] == job.workdir


def test_what_is_tried_again(job):
    spec = documents(job)[1]["spec"]
    disrupted, resumable, final = spec["podFailurePolicy"]["rules"]
    assert disrupted["action"] == resumable["action"] == "Ignore"
    assert disrupted["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert resumable["onExitCodes"]["values"] == [75]
    assert (final["action"], final["onExitCodes"]["values"]) == ("FailJob", [2, 65, 76, 77, 78])
    assert spec["backoffLimit"] == 6
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    assert spec["podReplacementPolicy"] == "Failed"


def test_several_machines_meet_at_the_first(job):
    service, made = documents(job)
    name = job.name
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert service["metadata"]["name"] == made["spec"]["template"]["spec"]["subdomain"] == name
    assert made["spec"]["completionMode"] == "Indexed"
    assert made["spec"]["completions"] == made["spec"]["parallelism"] == 2
    container = made["spec"]["template"]["spec"]["containers"][0]
    found = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert found == {
        "PET_NNODES": "2",
        "PET_NODE_RANK": None,
        "PET_MASTER_ADDR": f"{name}-0.{name}",
        "PET_MASTER_PORT": "29500",
    }


def test_one_machine_needs_no_service(make_job):
    (made,) = documents(make_job(storage="claim", nodes=1, cpus=None, seconds=None))
    assert not {"completions", "completionMode", "activeDeadlineSeconds"} & made["spec"].keys()
    pod = made["spec"]["template"]["spec"]
    assert "subdomain" not in pod
    assert pod["containers"][0]["env"] == []
    assert "requests" not in pod["containers"][0]["resources"]


def test_what_a_pod_is_given(job):
    made = documents(job)[1]["spec"]
    pod = made["template"]["spec"]
    assert made["activeDeadlineSeconds"] == 8 * 3600
    assert pod["containers"][0]["resources"] == {
        "requests": {"cpu": 16},
        "limits": {"nvidia.com/gpu": 2, "memory": "65536Mi"},
    }
    claims = [volume.get("persistentVolumeClaim") for volume in pod["volumes"]]
    assert claims == [{"claimName": "claim"}, None]


@pytest.mark.parametrize(("stop_seconds", "grace"), [(25, 60), (600, 635)])
def test_time_to_save(make_job, stop_seconds, grace):
    made = documents(make_job(storage="claim", stop_seconds=stop_seconds))[1]
    assert made["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == grace


@pytest.mark.parametrize("storage", ["s3://bucket", "Claim", "a b", "-claim", "claim\n"])
def test_a_storage_that_is_no_claim(make_job, storage):
    with pytest.raises(UsageError, match="no name of a PersistentVolumeClaim"):
        render(make_job(storage=storage))


def test_memory_is_never_none(make_job):
    made = documents(make_job(storage="claim", memory_bytes=1))[1]
    limits = made["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["memory"] == "1Mi"
