"""What a line that begins with a slash does in `nibble chat`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nibble.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from nibble.serve.chat import Chat


@dataclass(frozen=True)
class Command:
    """One command: how it is written, what it does, and the function that does it.

    `run` gets the chat and what stands after the name; its text is shown.
    """

    usage: str
    help: str
    run: Callable[["Chat", str], str]


def is_command(line: str) -> bool:
    """Whether a line is a command; two slashes say a text that begins with one."""
    return line.startswith("/") and not line.startswith("//")


def run_command(chat: "Chat", line: str) -> str | None:
    """Do what a line says; the text to show, or None where the chat ends.

    Raises:
        UsageError: If there is no such command, or it cannot be done as written.
    """
    name, _, argument = line[1:].partition(" ")
    if name in ("quit", "exit"):
        return None
    command = COMMANDS.get(name)
    if command is None:
        close = did_you_mean(name, [*COMMANDS, "quit"]).replace('"', '"/', 1)
        raise UsageError(f"there is no command /{name}", fix=close or "/help lists them")
    return command.run(chat, argument.strip())


def _help(chat: "Chat", argument: str) -> str:
    lines = [f"{command.usage:24} {command.help}" for command in COMMANDS.values()]
    lines += [
        f"{'/quit':24} end; so does Ctrl-D",
        "Ctrl-C stops an answer. A line that ends in \\ goes on in the next one.",
        "// says a text that begins with a slash.",
    ]
    return "\n".join(lines)


def _compare(chat: "Chat", argument: str) -> str:
    if argument not in ("", "on", "off"):
        raise UsageError(f"/compare {argument}: expected on or off")
    wanted = not chat.is_comparing if not argument else argument == "on"
    if wanted and chat.adapter is None:
        raise UsageError("no adapter answers, only the base", fix=_adapter_fix(chat))
    chat.is_comparing = wanted
    return f"the base answers beside {chat.adapter}" if wanted else "one answer a question"


def _adapter_fix(chat: "Chat") -> str:
    names = chat.adapters.names
    return f"/adapter {names[0]}" if names else "start with --adapter DIR"


def _adapter(chat: "Chat", argument: str) -> str:
    if argument:
        chat.switch(argument)
        return f"{argument} answers"
    names = [(None, "base"), *((name, name) for name in chat.adapters.names)]
    return "\n".join(f"{'*' if key == chat.adapter else ' '} {name}" for key, name in names)


def _system(chat: "Chat", argument: str) -> str:
    if argument:
        chat.system = "" if argument == "off" else argument
    return f"system: {chat.system}" if chat.system else "no system turn"


def _reset(chat: "Chat", argument: str) -> str:
    chat.reset()
    return "a new conversation"


def _undo(chat: "Chat", argument: str) -> str:
    return "taken back" if chat.undo() else "there is nothing to take back"


def _set(chat: "Chat", argument: str) -> str:
    from nibble.serve.chat import SETTINGS

    key, _, value = argument.replace("=", " ", 1).partition(" ")
    if key and not value.strip():
        raise UsageError(f"/set {key}: expected a value", fix=f"/set {key} VALUE")
    if key:
        chat.set(key, value.strip())
    shown = [key] if key else list(SETTINGS)
    return "\n".join(f"{name} {_shown(getattr(chat.sampling, name))}" for name in shown)


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(repr, value)) or "none"
    return "none" if value is None else str(value)


def _save(chat: "Chat", argument: str) -> str:
    if not argument:
        raise UsageError("/save: expected a file", fix="/save chats.jsonl")
    path = Path(argument).expanduser()
    num_turns = chat.save(path)
    return f"{num_turns} turns as one more row of {path}"


def _stats(chat: "Chat", argument: str) -> str:
    if not chat.paces:
        return "no answer yet"
    lines = [
        f"{pace.adapter or 'base'}: {pace.num_prompt_tokens:,} tokens read, first token after "
        f"{pace.first_s:.2f} s, {pace.num_new_tokens:,} tokens at {pace.tokens_per_s:.1f} tokens/s"
        for pace in chat.paces
    ]
    of = f" of {chat.context:,}" if chat.context else ""
    return "\n".join([*lines, f"the conversation has {chat.num_tokens():,}{of} tokens"])


COMMANDS = {
    "compare": Command("/compare [on|off]", "the base beside the adapter", _compare),
    "adapter": Command("/adapter [NAME]", "who answers; without a name: a list", _adapter),
    "system": Command("/system [TEXT|off]", "the turn before all others", _system),
    "reset": Command("/reset", "forget what was said", _reset),
    "undo": Command("/undo", "take the last question and its answer back", _undo),
    "set": Command("/set [KEY VALUE]", "such as /set temperature 0.7", _set),
    "save": Command("/save FILE.jsonl", "append the conversation as a row for training", _save),
    "stats": Command("/stats", "tokens and speed of the last answer", _stats),
    "help": Command("/help", "this list", _help),
}
