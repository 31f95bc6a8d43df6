"""Where in the rendered text the model's own words stand, for any chat template.

    text   <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello.<|im_end|>\\n
    span                                                          ^^^^^^^^^^^^^^^^

Three ways, the first that works is taken:

1. `{% generation %}`: the template says it itself, one block for each assistant turn.
2. Marks: each answer is rendered once more between two private characters. What is left
   without them must equal the true text, else the template looked at the answer and reacted.
3. Prefixes: the turn is what a render with it adds to the prompt before it.

An answer's span ends with its end of turn: the marker that the template writes directly after
the answer of a last turn (a special token, or else the rest of that line), where the same
marker follows here.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from nibble.data.prompt import ChatTemplate, render_turns
from nibble.data.template import TemplateError
from nibble.data.turns import Conversation, Message, Place

Span = tuple[int, int]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PLANES = (0xF0000, 0x100000)
_PLANE_SIZE = 0xFFFE


def target_spans(
    template: ChatTemplate, conversation: Conversation, *, train_on: str
) -> tuple[str, list[Span]]:
    """The rendered text of a conversation and the character spans that are targets.

    A template that writes no end of turn gets EOS after a last answer, else the model would
    never learn to stop.

    Args:
        template: Of the model.
        conversation: With at least one assistant turn.
        train_on: assistant (turns whose weight is not 0) | last (the last assistant turn, if
            its weight is not 0) | all (the whole text).

    Raises:
        DataError: The template refuses the conversation or hides a trained answer.
    """
    place = Place(conversation.path, conversation.line)
    try:
        turns, text = render_turns(template, conversation.messages, tools=conversation.tools)
        finder = _Finder(
            template, turns, text=text, tools=list(conversation.tools) or None, place=place
        )
        wanted = _wanted(conversation.messages, turns, train_on)
        spans = finder.spans(wanted)
    except TemplateError as error:
        raise place.fault("template-refuses", why=error) from None
    if turns[-1]["role"] == "assistant" and template.eos and not finder.end:
        text += template.eos
        if spans and wanted[-1] == len(turns) - 1:
            spans[-1] = (spans[-1][0], len(text))
    return text, [(0, len(text))] if train_on == "all" else spans


def _wanted(
    messages: Sequence[Message], turns: Sequence[Mapping[str, Any]], train_on: str
) -> list[int]:
    """The numbers, among the turns that the template takes, of the answers that are targets."""
    if train_on == "all":
        return []
    answers = [message for message in messages if message.role == "assistant"]
    places = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    chosen = list(zip(answers, places, strict=True))
    if train_on == "last":
        chosen = chosen[-1:]
    return [place for answer, place in chosen if answer.is_trained is not False]


class _Finder:
    """Finds answers in one rendered conversation.

    Args:
        template: That rendered it.
        turns: As the template took them.
        text: What it made of them.
        tools: As given to the template.
        place: For errors.
    """

    def __init__(
        self,
        template: ChatTemplate,
        turns: list[dict[str, Any]],
        *,
        text: str,
        tools: list[Mapping[str, Any]] | None,
        place: Place,
    ) -> None:
        self.template = template
        self.turns = turns
        self.text = text
        self.tools = tools
        self.place = place
        self.plane = self._free_plane()
        self.end = self._end_of_turn()

    def spans(self, wanted: list[int]) -> list[Span]:
        """The spans of the wanted turns, in order."""
        if not wanted:
            return []
        by_template = self._generation_spans()
        if by_template:
            return [by_template[i] for i in wanted]
        marked = self._marked_spans([i for i in wanted if not self.turns[i].get("tool_calls")])
        spans = []
        for i in wanted:
            start, stop = marked.get(i, (None, None))
            if start is not None and stop is not None:
                end = stop + len(self.end) if self.text.startswith(self.end, stop) else stop
                spans.append((start, end))
            else:
                spans.append(self._prefix_span(i, start, stop))
        return spans

    def _render(self, turns: Sequence[Mapping[str, Any]], **more: Any) -> str:
        return self.template.render(turns, tools=self.tools, **more)

    def _free_plane(self) -> int:
        for plane in _PLANES:
            if not _marks_of(plane).search(self.text):
                return plane
        raise self.place.fault("private-characters")

    def _end_of_turn(self) -> str:
        """What the template writes after the answer of a last turn: see `end_marker`."""
        answers = [i for i, turn in enumerate(self.turns) if turn["role"] == "assistant"]
        if not answers:
            return ""
        probe = chr(self.plane)
        last = answers[-1]
        turns = [*self.turns[:last], {"role": "assistant", "content": probe}]
        try:
            _, found, suffix = self._render(turns).rpartition(probe)
        except TemplateError:
            return ""
        return self.template.end_marker(suffix) if found else ""

    def _generation_spans(self) -> dict[int, Span]:
        """The blocks of `{% generation %}`, if there is one for each assistant turn."""
        if not _GENERATION.search(self.template.source):
            return {}
        marks = chr(self.plane), chr(self.plane + 1)
        marked = self._render(self.turns, generation_marks=marks)
        text, at = _take_marks(marked, self.plane)
        answers = [i for i, turn in enumerate(self.turns) if turn["role"] == "assistant"]
        starts, stops = at.get(0, []), at.get(1, [])
        if text != self.text or not len(starts) == len(stops) == len(answers):
            return {}
        return dict(zip(answers, zip(starts, stops, strict=True), strict=True))

    def _marked_spans(self, wanted: list[int]) -> dict[int, tuple[int | None, int | None]]:
        """Start and stop of each answer's own text; None where the template lost the mark."""
        if not wanted:
            return {}
        marked = self._render_marked(wanted, with_space=True)
        if marked is None:
            return {}
        text, at = _take_marks(marked, self.plane)
        if text != self.text:
            return {}
        found: dict[int, tuple[int | None, int | None]] = {}
        for n, i in enumerate(wanted):
            start, stop = (
                at[m][0] if len(at.get(m, ())) == 1 else None for m in (2 * n, 2 * n + 1)
            )
            found[i] = start, stop
        if any(_has_outer_space(self.turns[i]["content"]) for i in wanted):
            self._take_in_space(wanted, marked, found)
        return found

    def _render_marked(self, wanted: list[int], *, with_space: bool) -> str | None:
        """Render with marks inside the outer white space, which a template may strip."""
        turns = list(self.turns)
        for n, i in enumerate(wanted):
            lead, core, trail = _split_space(turns[i]["content"])
            inner = f"{chr(self.plane + 2 * n)}{core}{chr(self.plane + 2 * n + 1)}"
            content = f"{lead}{inner}{trail}" if with_space else inner
            turns[i] = {**turns[i], "content": content}
        try:
            return self._render(turns)
        except TemplateError:
            return None

    def _take_in_space(
        self,
        wanted: list[int],
        marked: str,
        found: dict[int, tuple[int | None, int | None]],
    ) -> None:
        """Widen spans by the outer white space that the template kept.

        Compared are the gaps between marks with and without it: a gap "\\n x" beside a bare
        gap "\\n" has kept " " of the turn before it or after it.
        """
        bare = self._render_marked(wanted, with_space=False)
        pattern = _marks_of(self.plane)
        gaps, bare_gaps = pattern.split(marked), pattern.split(bare or "")
        if len(gaps) != 2 * len(wanted) + 1 or len(bare_gaps) != len(gaps):
            return
        trail = ""
        for n in range(len(wanted) + 1):
            lead, _, next_trail = ("", "", "")
            if n < len(wanted):
                lead, _, next_trail = _split_space(self.turns[wanted[n]]["content"])
            after, before = _kept_space(gaps[2 * n], bare_gaps[2 * n], trail, lead)
            if n > 0:
                start, stop = found[wanted[n - 1]]
                found[wanted[n - 1]] = start, None if stop is None else stop + after
            if n < len(wanted):
                start, stop = found[wanted[n]]
                found[wanted[n]] = None if start is None else start - before, stop
            trail = next_trail

    def _prefix_span(self, i: int, start: int | None, stop: int | None) -> Span:
        """The span of turn `i` by what its render adds to the prompt before it."""
        try:
            history = self._render(self.turns[:i]) if i else ""
            prompt = self._render(self.turns[:i], add_generation_prompt=True) if i else ""
            whole = self._render(self.turns[: i + 1])
        except TemplateError:
            history, prompt, whole = "", "", ""
        begin = _num_common(prompt, self.text) if start is None else start
        if stop is not None:
            end = stop + len(self.end) if self.text.startswith(self.end, stop) else stop
        else:
            end = self._prefix_end(begin, whole)
        is_known = start is not None or (prompt and begin >= len(history.rstrip()))
        if is_known and end > begin:
            return begin, end
        core = _split_space(self.turns[i]["content"])[1]
        at = self.text.find(core)
        if not core or at < 0 or self.text.find(core, at + 1) >= 0:
            raise self.place.fault("template-hides", turn=i + 1)
        stop = at + len(core)
        return at, stop + len(self.end) if self.text.startswith(self.end, stop) else stop

    def _prefix_end(self, begin: int, whole: str) -> int:
        """The end of turn within what `whole` and the text have in common."""
        common = _num_common(whole, self.text)
        region = self.text[begin:common]
        at = region.rfind(self.end) if self.end else -1
        if at >= 0:
            return begin + at + len(self.end)
        special_end = self.template.last_special_end(region)
        return begin + (len(region.rstrip()) if special_end is None else special_end)


def _marks_of(plane: int) -> re.Pattern[str]:
    return re.compile(f"[{chr(plane)}-{chr(plane + _PLANE_SIZE - 1)}]")


def _take_marks(marked: str, plane: int) -> tuple[str, dict[int, list[int]]]:
    """The text without marks and, for each mark, where it stood in that text.

    `a<0>bc<1>d` gives `abcd` and {0: [1], 1: [3]}.
    """
    at: dict[int, list[int]] = {}
    for number, match in enumerate(_marks_of(plane).finditer(marked)):
        at.setdefault(ord(match.group()) - plane, []).append(match.start() - number)
    return _marks_of(plane).sub("", marked), at


def _num_common(a: str, b: str) -> int:
    """The number of characters with which both begin."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((n for n, (x, y) in pairs if x != y), min(len(a), len(b)))


def _has_outer_space(content: str) -> bool:
    return content != content.strip()


def _split_space(content: str) -> tuple[str, str, str]:
    core = content.strip()
    lead = content[: len(content) - len(content.lstrip())]
    return lead, core, content[len(lead) + len(core) :]


def _kept_space(gap: str, bare: str, trail: str, lead: str) -> tuple[int, int]:
    """How much of `trail` begins and of `lead` ends a gap that is `bare` without them."""
    for after in range(len(trail), -1, -1):
        before = len(gap) - len(bare) - after
        if 0 <= before <= len(lead) and gap == trail[:after] + bare + lead[len(lead) - before :]:
            return after, before
    return 0, 0
