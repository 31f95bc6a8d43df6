"""Exact match: what the model says greedily, beside the answer in the data.

Both are brought into one form first: white space at the ends goes, and any run of it within becomes
one space; upper and lower case are one where asked for. Or the last number of each is compared: 18,
18.0, $18 and "so it is 18." are the same number, and so are 1,000 and 1000.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from nibble.data.chat import prompt_ids, refuse_control_tokens
from nibble.data.turns import Conversation, Place
from nibble.errors import DataError
from nibble.serve.batch import Answer, Batch
from nibble.serve.generate import Sampling

# Keys and values of so many tokens are kept at once.
ANSWER_TOKENS = 16_384
_NUMBER = re.compile(r"[-−]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|[-−]?\.\d+")


@dataclass(frozen=True)
class Form:
    """In which form answers are compared.

    Args:
        ignore_case: Upper and lower case are the same.
        last_number: The last number of a text stands for it; it has none where there is no number.
    """

    ignore_case: bool = False
    last_number: bool = False

    def of(self, text: str) -> str | None:
        """The form of a text; None where it has none.

        >>> Form(ignore_case=True).of("  Yes,\\n it is "), Form(last_number=True).of("#### 1,080.0")
        ('yes, it is', '1080')
        """
        if self.last_number:
            return last_number(text)
        plain = " ".join(text.split())
        return plain.casefold() if self.ignore_case else plain

    def can_become(self, said: str, expected: str) -> bool:
        """Whether an answer that begins with `said` may still have the form `expected`."""
        return self.last_number or expected.startswith(self.of(said) or "")


def last_number(text: str) -> str | None:
    """The last number of a text without commas, sign of plus and zeros at the end.

    >>> last_number("3 x 4 = 12.50, so $12.50."), last_number("none")
    ('12.5', None)
    """
    found = _NUMBER.findall(text)
    if not found:
        return None
    value = Decimal(found[-1].replace(",", "").replace("−", "-"))
    return f"{value.normalize() + 0:f}"


@dataclass(frozen=True)
class Prompt:
    """The tokens that the model answers, and the answer of the data in the form of comparison."""

    ids: list[int]
    answer: str
    form: str
    path: str
    line: int


@dataclass(frozen=True)
class Told:
    """What the model said.

    Args:
        text: The answer, or its beginning where it was given up; None where the prompt is as long
            as the context of the model.
        is_exact: Whether it has the form of the answer of the data.
    """

    prompt: Prompt
    text: str | None
    is_exact: bool


def read_prompts(
    conversations: Iterable[Conversation],
    tokenizer: Any,
    form: Form,
    *,
    on_bad_row: Callable[[DataError], None] | None = None,
) -> Iterator[Prompt]:
    """Each conversation up to its last assistant turn, which is the expected answer.

    Raises:
        DataError: A bad row, plain text, or an answer without a number where these are compared.
    """
    for conversation in conversations:
        try:
            prompt = _prompt(conversation, tokenizer, form)
        except DataError as error:
            if on_bad_row is None:
                raise
            on_bad_row(error)
            continue
        yield prompt


def _prompt(conversation: Conversation, tokenizer: Any, form: Form) -> Prompt:
    place = Place(conversation.path, conversation.line)
    if conversation.is_text:
        raise place.fault("no-question")
    refuse_control_tokens(conversation, tokenizer)
    roles = [message.role for message in conversation.messages]
    last = len(roles) - 1 - roles[::-1].index("assistant")
    answer = conversation.messages[last].content
    expected = form.of(answer)
    if expected is None:
        raise place.fault("no-number")
    try:
        ids = prompt_ids(conversation.messages[:last], tokenizer, tools=conversation.tools)
    except DataError as error:
        raise DataError(error.reason, path=place.path, line=place.line, fix=error.fix) from None
    return Prompt(ids, answer, expected, place.path, place.line)


def exact_matches(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    form: Form,
    *,
    max_new_tokens: int = 256,
    whole: bool = True,
    on_done: Callable[[int], None] = lambda num_done: None,
) -> list[Told]:
    """The greedy answer to every prompt, and whether it is the expected one.

    An answer that is cut at `max_new_tokens`, or at the end of the context, is compared as far as
    it goes. A prompt as long as the context is not answered, and not exact.

    Args:
        whole: Write every answer to its end; else one that can no longer match is given up, which
            changes no result.
        on_done: Gets the number of answers that ended in a step.
    """
    context = getattr(model.config, "max_position_embeddings", None)
    texts: list[str | None] = [None] * len(prompts)
    batch = Batch(model, tokenizer, max_tokens=max(ANSWER_TOKENS, context or 0))
    running: dict[Answer, int] = {}
    for number, prompt in enumerate(prompts):
        most = min(max_new_tokens, (context or ANSWER_TOKENS) - len(prompt.ids))
        if most > 0:
            texts[number] = ""
            running[batch.add(prompt.ids, Sampling(max_new_tokens=most))] = number
    on_done(len(prompts) - len(running))
    while batch.has_work():
        num_before = len(running)
        for piece in batch.step():
            number = running[piece.sequence]
            text = texts[number] = (texts[number] or "") + piece.text
            if piece.finish is not None:
                del running[piece.sequence]
            elif not whole and not form.can_become(text, prompts[number].form):
                batch.drop(piece.sequence)
                del running[piece.sequence]
        on_done(num_before - len(running))
    return [
        Told(prompt, text, text is not None and form.of(text) == prompt.form)
        for prompt, text in zip(prompts, texts, strict=True)
    ]
