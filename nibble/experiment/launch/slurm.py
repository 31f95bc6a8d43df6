"""A batch script for Slurm: `sbatch FILE`.

Slurm signals the script alone before the time is over; the script has every machine save and end,
and puts the job back into the queue.
"""

from nibble.errors import UsageError
from nibble.experiment.launch.job import Job
from nibble.experiment.launch.script import RESUMABLE, command_of, quoted_lines, script

# From the signal to the end of the time, and what of it is not the run's own.
_LEAD_SECONDS = 120
_SPARE_SECONDS = 60

_HOSTS = """mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
if ((${#hosts[@]} != @NODES@)); then
    echo "${#hosts[@]} machines were given, not @NODES@" >&2
    exit 69
fi"""
_MEETING = """
export PET_NNODES=@NODES@ PET_MASTER_ADDR=${hosts[0]}
export PET_MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))"""
_ON_HOST = """    export PET_NODE_RANK=$2
    srun --nodes=1 --ntasks=1 --nodelist="$1" --cpus-per-task=@CPUS@ @COMMAND@"""
# A job that was cancelled, or that Slurm requeues itself, is COMPLETING.
_END = f"""if ((result == {RESUMABLE})); then
    state=$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)
    if [[ $state == RUNNING ]]; then scontrol requeue "$SLURM_JOB_ID"; fi
fi
exit "$result\""""


def render(job: Job) -> str:
    """The batch script.

    Raises:
        UsageError: If the time is over before a run could be saved.
    """
    lead = max(_LEAD_SECONDS, job.stop_seconds + _SPARE_SECONDS)
    if job.seconds is not None and job.seconds <= lead:
        raise UsageError(
            f"--time {job.seconds} s leaves nothing: the last {lead} s are kept to save the run",
            fix="give it more",
        )
    memory_mib = -(-(job.memory_bytes or 0) // 2**20)
    options = {
        "job-name": job.name,
        "nodes": job.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": job.gpus,
        "cpus-per-task": job.cpus,
        "mem": f"{memory_mib}M",
        "time": None if job.seconds is None else _time(job.seconds),
        "signal": f"B:TERM@{lead}",
        "dependency": "singleton",
        "open-mode": "append",
        "output": f"{job.name}-%j.out",
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None]
    hosts = _HOSTS + (_MEETING if job.nodes > 1 else "")
    command = quoted_lines(command_of(job), " " * 8)
    return script(
        "\n".join([*lines, "#SBATCH --requeue"]),
        hosts.replace("@NODES@", str(job.nodes)),
        _ON_HOST.replace("@CPUS@", str(job.cpus)).replace("@COMMAND@", command),
        _END,
    )


def _time(seconds: int) -> str:
    """As Slurm writes it.

    >>> _time(8 * 3600 + 90)
    '8:01:30'
    """
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
