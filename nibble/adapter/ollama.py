"""The Modelfile of Ollama: where the weights are, the prompt as a Go template, where to stop.

Ollama renders prompts by Go templates, models come with Jinja. What a template writes around a
turn of each role is found by rendering marked turns; the Go template made of these texts is used
only where it gives, on conversations of several shapes, the very text that Jinja gives.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nibble.adapter.vocabulary import end_of_turn
from nibble.data.chat import chat_template_of
from nibble.data.template import TemplateError

_MARK = "@@{}@@"
_SHAPES = (
    ("user",),
    ("system", "user"),
    ("user", "assistant", "user"),
    ("system", "user", "assistant", "user", "assistant", "user"),
)


@dataclass(frozen=True)
class Wrapping:
    """What a template writes around turns.

    Args:
        start: At the very beginning, where the tokenizer does not add it.
        around: Of each role that the template takes, the text before and after what is said.
        prompt: After which the model answers.
    """

    start: str
    around: Mapping[str, tuple[str, str]]
    prompt: str

    def render(self, roles: Sequence[str], bos: str = "") -> str:
        """The text of marked turns, as the Go template makes it."""
        parts = [
            f"{self.around[role][0]}{_MARK.format(number)}{self.around[role][1]}"
            for number, role in enumerate(roles)
        ]
        return bos + self.start + "".join(parts) + self.prompt


def find_wrapping(tokenizer: Any, *, adds_bos: bool) -> Wrapping | None:
    """What the chat template writes around turns; None where that is not all it does.

    Args:
        adds_bos: Whether BOS comes from the tokenizer and is left out of the template.
    """
    template = chat_template_of(tokenizer)
    bos = str(tokenizer.bos_token) if adds_bos else ""

    def rendered(roles: Sequence[str], **more: Any) -> str:
        turns = [{"role": r, "content": _MARK.format(n)} for n, r in enumerate(roles)]
        return template.render(turns, **more)

    try:
        wrapping = _wrapping(rendered, bos)
    except (TemplateError, ValueError):
        return None
    shapes = [roles for roles in _SHAPES if set(roles) <= wrapping.around.keys()]
    for roles in shapes:
        if wrapping.render(roles, bos) != rendered(roles, add_generation_prompt=True):
            return None
    return wrapping


def modelfile(
    source: Sequence[str], tokenizer: Any, wrapping: Wrapping | None, *, context_length: int
) -> str:
    """The text of a Modelfile.

    Args:
        source: Its first lines, FROM and ADAPTER.
        context_length: The tokens that the model was made for.
    """
    lines = [*source]
    if wrapping is not None:
        lines.append(f'TEMPLATE """{_go_template(wrapping)}"""')
    lines += [f"PARAMETER stop {_quoted(text)}" for text in _stops(tokenizer)]
    lines.append(f"PARAMETER num_ctx {context_length}")
    return "\n".join([*lines, ""])


def _wrapping(rendered: Any, bos: str) -> Wrapping:
    """Raises ValueError where a text is not found where it has to be."""
    around: dict[str, tuple[str, str]] = {}
    two = _between(rendered(("user", "assistant", "user")))
    asked = rendered(("user",), add_generation_prompt=True)
    closed = rendered(("user",))
    if len(two) != 4 or not two[0].startswith(bos) or not asked.startswith(closed):
        raise ValueError
    prompt = asked.removeprefix(closed)
    # What asks for an answer stands before every answer, and what is left ends the question.
    first, after_user, after_answer, last = two
    if not after_user.endswith(prompt) or last != after_user.removesuffix(prompt):
        raise ValueError
    start, before_user = _common_start(first.removeprefix(bos), after_answer)
    around["user"] = before_user, last
    around["assistant"] = prompt, after_answer.removesuffix(before_user)
    try:
        with_system = _between(rendered(("system", "user")))
    except (TemplateError, ValueError):
        with_system = []
    head = bos + start
    if (
        len(with_system) == 3
        and with_system[0].startswith(head)
        and with_system[1].endswith(before_user)
    ):
        ends = with_system[1].removesuffix(before_user)
        around["system"] = with_system[0].removeprefix(head), ends
    return Wrapping(start, around, prompt)


def _between(text: str) -> list[str]:
    """The texts before, between and after the marks.

    Raises:
        ValueError: If a mark is missing or moved.
    """
    parts, number = [], 0
    while (mark := _MARK.format(number)) in text:
        before, _, text = text.partition(mark)
        parts.append(before)
        number += 1
    if "@@" in "".join([*parts, text]):
        raise ValueError
    return [*parts, text]


def _common_start(first: str, later: str) -> tuple[str, str]:
    """What stands before the first question only, and what stands before every question.

    `later` ends the answer before it, so the text before every question ends both.
    """
    size = 0
    while size < min(len(first), len(later)) and first[-size - 1] == later[-size - 1]:
        size += 1
    # An answer has to end somehow: the whole of `later` cannot be the next question's.
    if size == len(later):
        raise ValueError
    return first[: len(first) - size], first[len(first) - size :]


def _go_template(wrapping: Wrapping) -> str:
    parts = [_go_text(wrapping.start), "{{ range .Messages }}"]
    word = "if"
    for role, (before, after) in wrapping.around.items():
        test = f'{{{{ {word} eq .Role "{role}" }}}}'
        parts.append(f"{test}{_go_text(before)}{{{{ .Content }}}}{_go_text(after)}")
        word = "else if"
    return "".join([*parts, "{{ end }}{{ end }}", _go_text(wrapping.prompt)])


def _go_text(text: str) -> str:
    return text.replace("{{", '{{ "{{" }}')


def _stops(tokenizer: Any) -> list[str]:
    """Texts that end an answer: the end of turn, and EOS."""
    number = end_of_turn(tokenizer)
    marker = None if number is None else tokenizer.convert_ids_to_tokens(number)
    return [text for text in dict.fromkeys([marker, tokenizer.eos_token]) if text]


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
