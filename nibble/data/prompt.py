"""Turns to text through a chat template, also where the template does not know every role.

Many templates were written for user and assistant alone. What they refuse or leave out is
written into a turn that they take, never dropped:

    system turn          before the first user turn's text, with an empty line between
    tool turn            a user turn <tool_response>...</tool_response>
    tool_calls           the answer's text <tool_call>{"name": ..., "arguments": ...}</tool_call>

Training and generation both come through here, so they see the same text.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nibble.data.template import TemplateError, render
from nibble.data.turns import Message

Turn = dict[str, Any]


@dataclass(frozen=True)
class ChatTemplate:
    """A template with what it needs of its tokenizer: no tokens, only texts."""

    source: str
    variables: Mapping[str, Any]
    special_texts: tuple[str, ...] = ()
    eos: str = ""
    _specials: re.Pattern[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        longest_first = sorted(filter(None, self.special_texts), key=len, reverse=True)
        pattern = "|".join(map(re.escape, longest_first)) or "(?!)"
        object.__setattr__(self, "_specials", re.compile(pattern))

    def render(self, turns: Sequence[Mapping[str, Any]], **more: Any) -> str:
        """The text of these turns; `more` are variables of the template."""
        given = {"tools": None, "documents": None, "add_generation_prompt": False}
        return render(self.source, turns, variables=given | dict(self.variables) | more)

    def end_marker(self, suffix: str) -> str:
        """The end of turn at the start of what follows the answer of a last turn."""
        special = re.compile(rf"\s*(?:{self._specials.pattern})").match(suffix)
        if special:
            return special.group()
        rest_of_line = re.match(r"\s*\S[^\n]*", suffix)
        return rest_of_line.group().rstrip() if rest_of_line else ""

    def last_special_end(self, text: str) -> int | None:
        """Where the last special text of `text` ends."""
        ends = [match.end() for match in self._specials.finditer(text)]
        return ends[-1] if ends else None


def render_turns(
    template: ChatTemplate,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    add_generation_prompt: bool = False,
) -> tuple[list[Turn], str]:
    """The turns as the template takes them, and the text it makes of them.

    Raises:
        TemplateError: The template does not take the turns in any form.
    """
    more = {"tools": list(tools) or None, "add_generation_prompt": add_generation_prompt}
    original = [_to_turn(message) for message in messages]
    refusal: TemplateError | None = None
    rendered: tuple[list[Turn], str] | None = None
    for turns in _forms(original):
        try:
            text = template.render(turns, **more)
        except TemplateError as error:
            refusal = refusal or error
            continue
        rendered = rendered or (turns, text)
        if _says_all(original, text):
            rendered = turns, text
            break
    if rendered is None:
        raise refusal or TemplateError("there are no turns")
    return _with_calls(template, *rendered, more)


def _to_turn(message: Message) -> Turn:
    return {"role": message.role, "content": message.content, **message.extra}


def _forms(turns: list[Turn]) -> list[list[Turn]]:
    """The turns as they are, then rewritten ever more."""
    forms = [turns]
    for form in (_fold_system(turns), _fold_tools(turns), _fold_system(_fold_tools(turns))):
        if form not in forms:
            forms.append(form)
    return forms


def _says_all(turns: Sequence[Turn], text: str) -> bool:
    """Whether system and tool turns are in the text, as they are or as JSON."""
    said = [t["content"].strip() for t in turns if t["role"] in ("system", "tool")]
    return all(s in text or json.dumps(s, ensure_ascii=False)[1:-1] in text for s in said)


def _fold_system(turns: list[Turn]) -> list[Turn]:
    """Write a first system turn before the text of the user turn after it."""
    if [turn["role"] for turn in turns[:2]] != ["system", "user"]:
        return turns
    content = f"{turns[0]['content']}\n\n{turns[1]['content']}"
    return [{**turns[1], "content": content}, *turns[2:]]


def _fold_tools(turns: list[Turn]) -> list[Turn]:
    """Write tool turns as one user turn for each run of them, joined to a user turn after it."""
    folded: list[Turn] = []
    is_open = False  # the last folded turn is a user turn made of tool turns
    for turn in turns:
        is_tool = turn["role"] == "tool"
        block = f"<tool_response>\n{turn['content']}\n</tool_response>"
        content = block if is_tool else turn["content"]
        if is_open and turn["role"] in ("tool", "user"):
            folded[-1] = {**folded[-1], "content": f"{folded[-1]['content']}\n{content}"}
        elif is_tool:
            folded.append({"role": "user", "content": content})
        else:
            folded.append(turn)
        is_open = is_tool
    return folded


def _with_calls(
    template: ChatTemplate, turns: list[Turn], text: str, more: Mapping[str, Any]
) -> tuple[list[Turn], str]:
    """Write tool calls into the text of their turn where the template ignored them."""
    if not any(turn.get("tool_calls") for turn in turns):
        return turns, text
    silent = [{key: turn[key] for key in turn if key != "tool_calls"} for turn in turns]
    try:
        is_ignored = template.render(silent, **more) == text
    except TemplateError:
        is_ignored = False
    if not is_ignored:
        return turns, text
    spoken = [
        {**plain, "content": _call_text(turn)} for plain, turn in zip(silent, turns, strict=True)
    ]
    return spoken, template.render(spoken, **more)


def _call_text(turn: Turn) -> str:
    calls = [json.dumps(c["function"], ensure_ascii=False) for c in turn.get("tool_calls", ())]
    blocks = [f"<tool_call>\n{call}\n</tool_call>" for call in calls]
    return "\n".join([turn["content"], *blocks] if turn["content"] or not calls else blocks)
