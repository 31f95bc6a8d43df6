"""Where runs execute: each is a process of this machine, `nibble train` with a config of its own.

    OUT/<name>.yaml     what is run
    OUT/<name>.log      what the process said
    OUT/<name>/         the folder of the run

What a run measures is its own then: its peak of memory, its time from start to end.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from nibble.config import RunConfig
from nibble.disk import replace_file
from nibble.errors import StoppedError
from nibble.train import folder

# What runs a config file.
TRAIN = (sys.executable, "-m", "nibble", "train")
# Of a log that is searched for the reason of a failure.
_LAST_BYTES = 20_000
_SAYS = "nibble: "
_FIX = "  fix: "


@dataclass(frozen=True)
class Started:
    """A run at work.

    Attributes:
        out: Its folder.
        log: What its process says.
        since: When it began, on the monotonic clock.
    """

    process: subprocess.Popen[bytes]
    out: Path
    log: Path
    since: float


@dataclass(frozen=True)
class Ended:
    """How a run ended.

    Attributes:
        exit_code: Of its process; 0 where it is finished.
        reason: Why it is not finished, for a person; empty where it is.
        fix: What to do about it, where the run said so.
        seconds: From its start to its end.
    """

    exit_code: int
    reason: str
    seconds: float
    fix: str = ""

    @property
    def is_finished(self) -> bool:
        """Whether the run came to its last step."""
        return self.exit_code == 0

    @property
    def is_resumable(self) -> bool:
        """Whether it was stopped or killed, and goes on when it is started again."""
        return self.exit_code == StoppedError.exit_code or self.exit_code < 0


def start(
    run: RunConfig,
    place: Path,
    name: str,
    *,
    environment: Mapping[str, str] | None = None,
    train: Sequence[str] = (),
) -> Started:
    """Start `nibble train`, or continue what stands in its folder.

    Args:
        place: The folder for this and other runs; it is there.
        name: Of the run among them.
        environment: Variables beside those of this process, such as CUDA_VISIBLE_DEVICES.
        train: What runs a config file; nothing stands for `TRAIN`.

    Raises:
        OSError: If its config or log cannot be written.
    """
    config, log = place / f"{name}.yaml", place / f"{name}.log"
    run = run.with_values({"out": str(place / name)}, "flag")
    replace_file(config, folder.run_text(run).encode())
    with log.open("ab") as file:
        process = subprocess.Popen(
            [*(train or TRAIN), str(config)],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            # Ctrl-C in the terminal is for whoever started the runs: that stops them in order.
            start_new_session=True,
            env={**os.environ, **(environment or {})},
        )
    return Started(process, place / name, log, time.monotonic())


def ended(started: Started) -> Ended | None:
    """How a run ended; None while it is at work."""
    code = started.process.poll()
    if code is None:
        return None
    seconds = time.monotonic() - started.since
    reason, fix = ("", "") if code == 0 else _reason_and_fix(started.log, code)
    return Ended(code, reason, seconds, fix)


def stop(started: Started) -> None:
    """Let a run finish its step, save and end."""
    with suppress(ProcessLookupError):
        started.process.send_signal(signal.SIGTERM)
    started.process.wait()


def _reason_and_fix(log: Path, code: int) -> tuple[str, str]:
    """The last error that a process told and what to do about it, or how it ended."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}", ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _LAST_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    said = [at for at, line in enumerate(lines) if line.startswith(_SAYS)]
    if not said:
        return f"ended with exit code {code}", ""
    after = [line for line in lines[said[-1] + 1 :] if line.startswith(_FIX)]
    fix = after[-1].removeprefix(_FIX) if after else ""
    return lines[said[-1]].removeprefix(_SAYS), fix
