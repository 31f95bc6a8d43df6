"""A script that starts a run on hosts that ssh reaches: `bash FILE`."""

import shlex

from nibble.experiment.launch.job import Job
from nibble.experiment.launch.script import command_of, quoted_lines, script

# A host that says nothing for 30 s is lost; nobody is there to type a password.
_ON_HOST = (
    """    ssh -o BatchMode=yes -o ServerAliveInterval=10 -- "$1" "PET_NODE_RANK=$2 $command\""""
)


def render(job: Job) -> str:
    """The script; the first host is where the others meet it."""
    words = command_of(job)
    if job.nodes > 1:
        address = job.hosts[0].rpartition("@")[2]
        meeting = {"NNODES": job.nodes, "MASTER_ADDR": address, "MASTER_PORT": job.port}
        words = ["env", *(f"PET_{name}={value}" for name, value in meeting.items()), *words]
    return script(
        "# Runs until the run ends; once more goes on with it.",
        f"hosts=({shlex.join(job.hosts)})\n"
        # Quoted twice: for this shell and for the one that ssh starts.
        f"command={shlex.quote(quoted_lines(words, '    '))}",
        _ON_HOST,
        'exit "$result"',
    )
