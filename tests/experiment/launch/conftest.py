"""Jobs that never were, and stand-ins for the programs that would start them."""

import os
import signal
import stat
import subprocess
import time

import pytest

from nibble.config import load_config
from nibble.experiment.launch.job import Job, train_words

# What a shell, a YAML file and Kubernetes would each like to read otherwise.
UGLY = "a b'c\"d$(touch PWNED)`touch PWNED`\n; touch PWNED # $HOME $(PET_NNODES) $$ \\ é: {x}"

# The command on a machine: writes down what it was given, then ends as its file says.
_COMMAND = r"""#!/bin/bash
me=${PET_NODE_RANK:-0}
printf '%s\0' "$PWD" "${PET_NNODES-}" "${PET_MASTER_ADDR-}" "${PET_MASTER_PORT-}" "$@" \
    > "$NOTES/words-$me"
trap 'sleep 0.1; echo TERM > "$NOTES/signal-$me"; exit 75' TERM
echo > "$NOTES/began-$me"
for code in "$NOTES"/code-*; do
    [[ $(cat "$code") != wait ]] || until [[ -e ${code/code/began} ]]; do sleep 0.02; done
done
code=$(cat "$NOTES/code-$me")
[[ $code != kill ]] || kill -KILL $$
[[ $code == wait ]] || exit "$code"
while :; do sleep 0.05; done
"""
_FAKES = {
    "srun": '#!/bin/bash\nwhile [[ $1 == --* ]]; do echo "$1" >> "$NOTES/srun"; shift; done\n'
    'exec "$@"\n',
    "ssh": '#!/bin/bash\nwhile [[ $1 != -- ]]; do shift; done\necho "$2" >> "$NOTES/hosts"\n'
    'exec sh -c "$3"\n',
    "scontrol": '#!/bin/bash\nif [[ $1 == show ]]; then tr , "\\n" <<< "$3"; '
    'else echo "$*" >> "$NOTES/requeued"; fi\n',
    "squeue": '#!/bin/bash\ncat "$NOTES/state"\n',
}


class Machines:
    """A folder of stand-ins that run everything here, and what they wrote down."""

    def __init__(self, folder):
        self.folder, self.notes, self.work = folder, folder / "notes", folder / UGLY
        programs = folder / "bin"
        for made in (self.notes, self.work, programs):
            made.mkdir()
        self.python = folder / "bin" / f"python {UGLY.replace('/', '')}"
        for path, text in {
            **{programs / name: text for name, text in _FAKES.items()},
            self.python: _COMMAND,
        }.items():
            path.write_text(text)
            path.chmod(path.stat().st_mode | stat.S_IXUSR)
        self.started = []
        self.codes("0", "0")
        (self.notes / "state").write_text("RUNNING\n")
        self.environment = {
            **os.environ,
            **{"PATH": f"{programs}:{os.environ['PATH']}", "NOTES": str(self.notes)},
            **{"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "gpu-0,gpu-1"},
        }

    def codes(self, *codes):
        """How the command ends on each machine: a code, `wait` for a signal, or `kill`."""
        for rank, code in enumerate(codes):
            (self.notes / f"code-{rank}").write_text(code)

    def start(self, script):
        path = self.folder / "script"
        path.write_text(script)
        assert subprocess.run(["bash", "-n", path]).returncode == 0
        return self.popen(["bash", path])

    def popen(self, words, **more):
        process = subprocess.Popen(
            words, env=self.environment, cwd=self.folder, preexec_fn=_heed_signals, **more
        )
        self.started.append(process)
        return process

    def close(self):
        for process in self.started:
            process.kill()
            process.communicate()

    def run(self, script):
        return self.start(script).wait(30)

    def until(self, *names):
        give_up = time.monotonic() + 20
        while not all((self.notes / name).exists() for name in names):
            assert time.monotonic() < give_up, list(self.notes.iterdir())
            time.sleep(0.02)

    def said(self, name):
        path = self.notes / name
        return path.read_text() if path.exists() else ""

    def words(self, rank):
        """Working folder, PET_NNODES, address, port, and the words of the command."""
        return self.said(f"words-{rank}").split("\0")[:-1]

    def stop(self, process, number=signal.SIGTERM):
        process.send_signal(number)
        return process.wait(20)


@pytest.fixture
def machines(tmp_path):
    found = Machines(tmp_path)
    yield found
    found.close()


def _heed_signals():
    """A shell cannot trap what was ignored when it began, as under `nohup`."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def make_job(tmp_path):
    """A job with two machines whose names are as ugly as can be; any part may be given."""

    def make(python="python3", **changes):
        run = load_config(None, [f"model.name={UGLY!r}", "data.train=rows.jsonl", "lora.rank=8"])
        run = run.with_values({"model.name": UGLY}, "flag")
        values = {
            "name": "nibble-first-0123abcd",
            "words": (str(python), "-m", "nibble", *train_words(run, f"/w/{UGLY}", 2)),
            "workdir": f"/w/{UGLY}",
            "nodes": 2,
            "gpus": 2,
            "stop_seconds": 25,
            "cpus": 16,
            "memory_bytes": 64 * 2**30,
            "seconds": 8 * 3600,
        }
        return Job(**{**values, **changes})

    return make
