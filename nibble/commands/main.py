"""The verbs, and one place where every error becomes a message and an exit code."""

import os
import sys
from collections.abc import Sequence

import typer

from nibble.commands import chat, config, data, demo, doctor, evaluate, plan, replay, train
from nibble.environment import wait_passively
from nibble.errors import NibbleError, RunInterrupted

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
app.command("eval")(evaluate.evaluate)
app.command("chat")(chat.chat)
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
    code = _run(words, is_debug)
    if arguments is None:
        _leave(code)
    sys.exit(code)


def _run(words: Sequence[str], is_debug: bool) -> int:
    try:
        app(args=list(words), standalone_mode=True)
    except NibbleError as error:
        if is_debug:
            raise
        print(f"nibble: {error}", file=sys.stderr)  # noqa: T201
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
        print(  # noqa: T201
            f"nibble: this is a bug of ours: {type(error).__name__}: {error}\n"
            "  fix: please report it with the output of the same command and --debug",
            file=sys.stderr,
        )
        return 1
    return 0


def _leave(code: int) -> None:
    """End this process at once: taking the libraries apart would last a second.

    Output that nobody reads any more ends as the interpreter would have it.
    """
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        return
    os._exit(code)


def _interrupted() -> int:
    print("nibble: interrupted", file=sys.stderr)  # noqa: T201
    return RunInterrupted.exit_code
