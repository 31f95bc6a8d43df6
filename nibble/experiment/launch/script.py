"""The script that Slurm and ssh share: one command on each host, and one exit code for all.

Every host is given an input on which nothing comes. Its end asks the command there to save and
end: also when this script is killed, or the connection breaks. `srun` would kill its command at
once where it is signalled itself.
"""

import shlex

from nibble.errors import StoppedError
from nibble.experiment.launch.job import Job

MARK = "# Written by `nibble launch`, which replaces it."
RESUMABLE = StoppedError.exit_code
# Ranks whose others are gone end within 30 s.
PATIENCE_SECONDS = 45

# $1 is the folder, the rest the command, which gets SIGTERM at the end of the input, or where this
# shell is signalled, as Slurm does: once this shell ends, what it started is killed.
_UNTIL_END_OF_INPUT = """cd "$1" || exit 2
shift
exec 3<&0
"$@" </dev/null 3<&- &
command=$!
{ while read -r line; do :; done <&3; kill "$command"; } >/dev/null 2>&1 &
reader=$!
exec 3<&-
trap "kill $command" TERM INT HUP USR1
while
    wait "$command"
    code=$?
    kill -0 "$command" 2>/dev/null
do :; done
kill "$reader" 2>/dev/null
exit "$code"
"""

# 7 holds the input open, 8 is where it is read, 9 takes the exit codes. Each command closes its
# own copy of 7 by `stop`: the input ends once no writer is left.
_RUN = r"""
pipes=$(mktemp -d) && mkfifo "$pipes/input" "$pipes/codes" || exit 74
exec 7<>"$pipes/input" 8<"$pipes/input" 9<>"$pipes/codes"
rm -r "$pipes"
stop() { exec 7>&-; }
trap stop TERM INT HUP
for rank in "${!hosts[@]}"; do
    { stop; on_host "${hosts[rank]}" "$rank"; echo "$?" >&9; } <&8 &
done

result=0 last=0
for host in "${hosts[@]}"; do
    until read -r -t 2 -u 9 code; do
        [[ $(jobs -pr) ]] || { code=@RESUMABLE@; break; }
        if ((last && SECONDS > last)); then stop; fi
    done
    # Killed: the run can be continued. 255 is of ssh itself.
    if ((code > 128 && code < 255)); then code=@RESUMABLE@; fi
    # A reason of its own goes before that of being left alone.
    if ((code != 0 && (result == 0 || result == @RESUMABLE@))); then result=$code; fi
    # After one was left alone the others end too, and one of them knows why.
    if ((code == @RESUMABLE@)); then last=$((SECONDS + @PATIENCE@)); elif ((code)); then stop; fi
done
""".replace("@RESUMABLE@", str(RESUMABLE)).replace("@PATIENCE@", str(PATIENCE_SECONDS))


def script(head: str, hosts: str, on_host: str, end: str) -> str:
    """A bash script.

    Args:
        head: Comments.
        hosts: Sets the array `hosts`.
        on_host: Runs the command on host $1, which is number $2, with its own input.
        end: What is done with `result`.
    """
    parts = [f"#!/bin/bash\n{MARK}\n{head}", hosts, f"on_host() {{\n{on_host}\n}}", _RUN.strip()]
    return "\n\n".join([*parts, end]) + "\n"


def command_of(job: Job) -> list[str]:
    """The words that run a job on one machine until its input ends."""
    return ["sh", "-c", _UNTIL_END_OF_INPUT, "sh", job.workdir, *job.words]


def quoted_lines(words: list[str], indent: str) -> str:
    """Words of a shell; every option begins a line."""
    quoted = [(f"\\\n{indent}" if word[:2] == "--" else "") + shlex.quote(word) for word in words]
    return " ".join(quoted)
