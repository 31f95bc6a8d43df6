"""A Job for Kubernetes, with a headless service where several machines meet: `kubectl apply`."""

import re
from typing import Any

from nibble.errors import (
    DataError,
    DoesNotFitError,
    NonFiniteError,
    OutOfMemoryError,
    StoppedError,
    UsageError,
)
from nibble.experiment.launch.document import to_text
from nibble.experiment.launch.job import Job

_CONTAINER = "train"
_STORAGE, _SHARED_MEMORY = "storage", "shared-memory"
# Another attempt would end as this one did.
_FINAL = sorted(
    error.exit_code
    for error in (UsageError, DataError, NonFiniteError, OutOfMemoryError, DoesNotFitError)
)
_MOST_FAILURES = 6
_CLAIM = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
_LEAST_GRACE_SECONDS = 60
_SPARE_SECONDS = 35
_RULES = [
    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    {
        "action": "Ignore",
        "onExitCodes": {
            "containerName": _CONTAINER,
            "operator": "In",
            "values": [StoppedError.exit_code],
        },
    },
    {
        "action": "FailJob",
        "onExitCodes": {"containerName": _CONTAINER, "operator": "In", "values": _FINAL},
    },
]


def render(job: Job) -> str:
    """The documents of the file.

    Raises:
        UsageError: If the storage cannot be the name of a claim.
    """
    if not _CLAIM.fullmatch(job.storage):
        raise UsageError(
            f"--storage {job.storage!r} is no name of a PersistentVolumeClaim",
            fix="give one of `kubectl get pvc`",
        )
    return to_text(*([_service(job)] if job.nodes > 1 else []), _job(job))


def _job(job: Job) -> dict[str, Any]:
    several: dict[str, Any] = {}
    if job.nodes > 1:
        several = {"completionMode": "Indexed", "completions": job.nodes, "parallelism": job.nodes}
    limit = {} if job.seconds is None else {"activeDeadlineSeconds": job.seconds}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": job.name},
        "spec": {
            **several,
            **limit,
            "backoffLimit": _MOST_FAILURES,
            "podFailurePolicy": {"rules": _RULES},
            # The one that is ending still holds the folder of the run.
            "podReplacementPolicy": "Failed",
            "template": {"spec": _pod(job)},
        },
    }


def _pod(job: Job) -> dict[str, Any]:
    limits = {"nvidia.com/gpu": job.gpus, "memory": f"{-(-(job.memory_bytes or 0) // 2**20)}Mi"}
    requests = {} if job.cpus is None else {"requests": {"cpu": job.cpus}}
    container = {
        "name": _CONTAINER,
        "image": job.image,
        "command": [_literal(word) for word in job.words],
        "workingDir": job.workdir,
        "env": _meeting(job) if job.nodes > 1 else [],
        "resources": {**requests, "limits": limits},
        "volumeMounts": [
            {"name": _STORAGE, "mountPath": job.workdir},
            {"name": _SHARED_MEMORY, "mountPath": "/dev/shm"},
        ],
    }
    return {
        # The rules above are for pods that are replaced, not restarted.
        "restartPolicy": "Never",
        **({"subdomain": job.name} if job.nodes > 1 else {}),
        "terminationGracePeriodSeconds": max(
            _LEAST_GRACE_SECONDS, job.stop_seconds + _SPARE_SECONDS
        ),
        "containers": [container],
        "volumes": [
            {"name": _STORAGE, "persistentVolumeClaim": {"claimName": job.storage}},
            {"name": _SHARED_MEMORY, "emptyDir": {"medium": "Memory"}},
        ],
    }


def _meeting(job: Job) -> list[dict[str, Any]]:
    """The environment in which several machines find each other."""
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    return [
        {"name": "PET_NNODES", "value": str(job.nodes)},
        {"name": "PET_NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": index}}},
        {"name": "PET_MASTER_ADDR", "value": f"{job.name}-0.{job.name}"},
        {"name": "PET_MASTER_PORT", "value": str(job.port)},
    ]


def _service(job: Job) -> dict[str, Any]:
    """What gives every pod of the job a name."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": job.name},
        "spec": {
            "clusterIP": "None",
            "selector": {"batch.kubernetes.io/job-name": job.name},
            # They meet before any of them is ready.
            "publishNotReadyAddresses": True,
        },
    }


def _literal(word: str) -> str:
    """A word in which Kubernetes replaces nothing: it reads $(NAME), and $$ as a dollar."""
    return word.replace("$", "$$")
