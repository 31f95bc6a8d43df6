"""A managed job for SkyPilot: `sky jobs launch FILE`."""

import re
import shlex
from typing import Any

from nibble.errors import StoppedError, UsageError
from nibble.experiment.launch.document import to_text
from nibble.experiment.launch.job import Job
from nibble.experiment.launch.script import quoted_lines

_ACCELERATOR = re.compile(r"[A-Za-z][A-Za-z0-9-]*")
_MEETING = """export PET_NNODES="$SKYPILOT_NUM_NODES" PET_NODE_RANK="$SKYPILOT_NODE_RANK"
export PET_MASTER_ADDR="$(echo "$SKYPILOT_NODE_IPS" | head -n 1)" PET_MASTER_PORT=@PORT@
"""


def render(job: Job) -> str:
    """The task.

    Raises:
        UsageError: If the device is written in no way that SkyPilot knows.
    """
    if not _ACCELERATOR.fullmatch(job.device):
        raise UsageError(
            f'--device "{job.device}" is not how SkyPilot writes a GPU',
            fix="write A100-80GB or H100; `sky show-gpus` has them all",
        )
    resources: dict[str, Any] = {
        "accelerators": {job.device: job.gpus},
        "image_id": f"docker:{job.image}",
        "job_recovery": {"recover_on_exit_codes": [StoppedError.exit_code]},
    }
    if job.cpus is not None:
        resources["cpus"] = f"{job.cpus}+"
    if job.memory_bytes is not None:
        # SkyPilot's GB are 2**30 bytes.
        resources["memory"] = f"{-(-job.memory_bytes // 2**30)}+"
    return to_text(
        {
            "name": job.name,
            "num_nodes": job.nodes,
            "resources": resources,
            **_storage(job),
            "run": _run(job),
        }
    )


def _storage(job: Job) -> dict[str, Any]:
    if "://" in job.storage:
        bucket = {"source": job.storage, "mode": "MOUNT_CACHED"}
        return {"file_mounts": {job.workdir: bucket}}
    return {"volumes": {job.workdir: job.storage}}


def _run(job: Job) -> str:
    """What every machine runs; the number of GPUs is the one that it was given."""
    meeting = _MEETING.replace("@PORT@", str(job.port)) if job.nodes > 1 else ""
    *words, _ = job.words
    command = f'exec {quoted_lines(words, "    ")} "$SKYPILOT_NUM_GPUS_PER_NODE"'
    return f"{meeting}cd {shlex.quote(job.workdir)} || exit 2\n{command}\n"
