"""`nibble chat`: talk to a base, an adapter, or both side by side."""

import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from nibble.serve.chat import Chat


def chat(
    model: Annotated[str, typer.Option(help="Hub id or local folder.")],
    adapter: Annotated[
        list[str] | None, typer.Option(help="Adapter folder, or name=folder; repeatable.")
    ] = None,
    compare: Annotated[bool, typer.Option(help="Answer with the base beside the adapter.")] = False,
    method: Annotated[
        str,
        typer.Option(help="lora: 16-bit base; qlora: 4-bit base; as the adapter was trained."),
    ] = "",
    system: Annotated[str, typer.Option(help="The turn before all others.")] = "",
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 256,
    seed: Annotated[int, typer.Option(help="Of the draw above temperature 0.")] = 0,
) -> None:
    """Chat in the terminal, or answer every line that is piped in; /help lists its commands."""
    from nibble.commands.bases import base_options
    from nibble.commands.named import named_adapters
    from nibble.errors import UsageError

    folders = named_adapters(adapter or ())
    if compare and not folders:
        raise UsageError("--compare needs an adapter", fix="give --adapter DIR")

    options = base_options(method, [Path(folder) for folder in folders.values()])

    from nibble.adapter.many import Adapters
    from nibble.commands.progress import working
    from nibble.model.load import load_base
    from nibble.serve.chat import Chat
    from nibble.serve.generate import Sampling

    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    with working("loading"):
        base, tokenizer = load_base(model, device=_device(), **options)
        adapters = Adapters(base)
        for name, folder in folders.items():
            adapters.load(name, folder)
    talk = Chat(base, tokenizer, adapters, sampling=sampling)
    talk.is_comparing, talk.system = compare, system
    _converse(talk)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _converse(talk: "Chat") -> None:
    """Read and answer until there is nothing more to read."""
    from rich.console import Console

    from nibble.commands.terminal import line_history, read_question, teller

    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    tell = teller(Console(stderr=True))
    if not talk.has_template:
        tell(
            "this model has no chat template: questions go to it as plain text, each under a "
            "heading, as in training"
        )
    is_asked = sys.stdin.isatty()
    if is_asked:
        tell("/help lists the commands, /quit or Ctrl-D ends")
    with line_history() as typed:
        while (line := _next_line(read_question)) is not None:
            typed += line.splitlines()
            if line and not _take(talk, line, console, tell, is_asked):
                return
    if is_asked:
        sys.stderr.write("\n")


def _next_line(read: Callable[[], str]) -> str | None:
    """The next line, or None at the end of the chat."""
    try:
        return read()
    except (EOFError, KeyboardInterrupt):
        return None


def _take(
    talk: "Chat", line: str, console: "Console", tell: Callable[[str], None], is_asked: bool
) -> bool:
    """Answer a line or do what it says; whether the chat goes on.

    Raises:
        NibbleError: What went wrong, where no person is there to correct it.
    """
    from nibble.commands.slash import is_command, run_command
    from nibble.errors import NibbleError

    try:
        if not is_command(line):
            _answer(talk, line.replace("/", "", 1) if line.startswith("//") else line, console)
            return True
        text = run_command(talk, line)
        if text is not None:
            tell(text)
        return text is not None
    except NibbleError as error:
        if not is_asked:
            raise
        tell(str(error))
        return True
    except KeyboardInterrupt:
        if not is_asked:
            raise
        tell("stopped")
        return True


def _answer(talk: "Chat", question: str, console: "Console") -> None:
    from nibble.commands.terminal import show_answers

    names = [name or "base" for name in talk.speakers]
    with closing(talk.ask(question)) as parts:
        show_answers(parts, names, console)
