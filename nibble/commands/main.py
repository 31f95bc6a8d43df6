"""The verbs, and one place where every error becomes a message and an exit code."""

import errno
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, TextIO, cast

import typer

from nibble.commands import (
    chat,
    compare,
    config,
    data,
    demo,
    doctor,
    evaluate,
    export,
    launch,
    merge,
    plan,
    replay,
    serve,
    sweep,
    train,
)
from nibble.environment import wait_passively
from nibble.errors import DiskError, NibbleError, RunInterrupted, StoppedError

app = typer.Typer(
    name="nibble",
    help="Fine-tune large language models with LoRA and QLoRA on your own machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("demo")(demo.demo)
app.command("plan")(plan.plan)
app.command("train")(train.train)
app.command("replay")(replay.replay)
app.command("sweep")(sweep.sweep)
app.command("eval")(evaluate.evaluate)
app.command("compare")(compare.compare)
app.command("launch")(launch.launch)
app.command("merge")(merge.merge)
app.command("export")(export.export)
app.command("chat")(chat.chat)
app.command("serve")(serve.serve)
app.command("doctor")(doctor.doctor)
app.command("schema")(config.schema)
app.command("explain")(config.explain)
app.add_typer(data.app, name="data", help="Look at data before training on it.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    is_debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    wait_passively()
    if arguments is not None:
        sys.exit(_run(words, is_debug))
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _stop)
    # What a chat says is all that it does: it ends with its reader.
    if words[:1] != ["chat"]:
        sys.stdout = cast(TextIO, _Lasting(sys.stdout))
        sys.stderr = cast(TextIO, _Lasting(sys.stderr))
    code = _run(words, is_debug)
    _leave(code)
    sys.exit(code)


def _stop(number: int, frame: object) -> None:
    """A signal before or after the part of a run that hears it: the code of a run that does."""
    raise SystemExit(StoppedError.exit_code)


class _Lasting:
    """An output that outlives its reader: what nobody reads any more is thrown away.

    So a command does all of its work, and its exit code is that of the work.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._throw_away()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._throw_away()

    def _throw_away(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


def _run(words: Sequence[str], is_debug: bool) -> int:
    try:
        app(args=list(words), standalone_mode=True)
    except NibbleError as error:
        if is_debug:
            raise
        if not error.is_told:
            _tell(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        return _interrupted()
    except SystemExit as stop:
        if stop.code == RunInterrupted.exit_code:
            return _interrupted()
        return stop.code if isinstance(stop.code, int) else 1
    except Exception as error:
        if is_debug:
            raise
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            _tell(f"cannot write what the command says: {error.strerror}")
            return DiskError.exit_code
        _tell(
            f"this is a bug of ours: {type(error).__name__}: {error}\n"
            "  fix: please report it with the output of the same command and --debug"
        )
        return 1
    return 0


def _leave(code: int) -> None:
    """End this process at once: taking the libraries apart would last a second.

    Output that cannot be written ends as the interpreter would have it.
    """
    with suppress(OSError):
        sys.stderr.flush()
    try:
        sys.stdout.flush()
    except OSError:
        return
    os._exit(code)


def _interrupted() -> int:
    _tell("interrupted")
    return RunInterrupted.exit_code


def _tell(text: str) -> None:
    """Say it on stderr; the exit code counts where nobody is there to read."""
    with suppress(OSError):
        print(f"nibble: {text}", file=sys.stderr)  # noqa: T201
