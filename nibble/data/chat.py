"""Conversation to Example: token ids, and labels that say which of them are targets.

Labels are not shifted: `labels[i] == input_ids[i]` where token i is a target, else -100. A
token is a target if at least one of its characters is in a target span (`spans.py`); the bytes
of one character share its offsets and so its fate. Nothing depends on a padding id.

Text that the tokenizer would read as a control token, such as <|im_end|>, makes a row bad: it
would end its turn and could begin another.

A plain text document is tokenised as its tokenizer does it, EOS is added where it does not
stand, and every token is a target.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from nibble.data.prompt import ChatTemplate, render_turns
from nibble.data.spans import Span, target_spans
from nibble.data.template import PLAIN_TEMPLATE as PLAIN_TEMPLATE
from nibble.data.template import TemplateError
from nibble.data.turns import Conversation, Message, Place, leaves, read_turns
from nibble.errors import DataError, ModelError

NOT_TARGET = -100
_ROWS_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids and labels of one conversation, with its origin.

    `is_text` marks a plain document: it is cut into pieces where it is too long for a row.
    """

    input_ids: list[int]
    labels: list[int]
    path: str
    line: int
    is_text: bool = False


def tokenize(conversation: Conversation, tokenizer: Any, *, train_on: str = "assistant") -> Example:
    """The tokens of one conversation and which of them are targets.

    Args:
        conversation: As read.
        tokenizer: A fast tokenizer of transformers.
        train_on: assistant | last | all; see `target_spans`.

    Raises:
        DataError: The chat template does not take the conversation.
        ModelError: The tokenizer gives no offsets.
    """
    return next(iter(tokenize_all([conversation], tokenizer, train_on=train_on)))


def tokenize_all(
    conversations: Iterable[Conversation],
    tokenizer: Any,
    *,
    train_on: str = "assistant",
    on_bad_row: Callable[[DataError], None] | None = None,
) -> Iterator[Example]:
    """Like `tokenize` for many, in order, with the tokenizer called on many at once."""
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"the tokenizer {type(tokenizer).__name__} gives no character offsets, "
            "which the mask of the targets needs",
            fix="use a model folder with a tokenizer.json",
        )
    template = chat_template_of(tokenizer)
    controls = _control_tokens(tokenizer)

    def spans_of(conversation: Conversation) -> tuple[str, list[Span]]:
        _refuse_control_tokens(conversation, controls)
        return target_spans(template, conversation, train_on=train_on)

    rows = iter(conversations)
    while batch := list(islice(rows, _ROWS_AT_ONCE)):
        yield from _tokenize_batch(batch, tokenizer, spans_of=spans_of, on_bad_row=on_bad_row)


def chat_template_of(tokenizer: Any) -> ChatTemplate:
    """The tokenizer's own chat template, or `PLAIN_TEMPLATE` where it has none."""
    source = tokenizer.chat_template
    if isinstance(source, dict):
        source = source.get("default") or next(iter(source.values()))
    variables = dict(tokenizer.special_tokens_map)
    eos = tokenizer.eos_token or ""
    if not source:
        source = PLAIN_TEMPLATE
        variables["bos_token"] = tokenizer.bos_token if adds_bos(tokenizer) else ""
        variables["eos_token"] = eos
    specials = tuple(str(token) for token in tokenizer.added_tokens_decoder.values())
    return ChatTemplate(source, variables, specials, eos)


def render_prompt(
    messages: Sequence[Message | Mapping[str, Any]],
    tokenizer: Any,
    *,
    tools: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The text after which the model writes its answer.

    Args:
        tools: What the model may call, as the template takes it.

    Raises:
        DataError: The chat template does not take the messages.
    """
    turns = [m if isinstance(m, Message) else _to_message(m) for m in messages]
    template = chat_template_of(tokenizer)
    try:
        _, text = render_turns(template, turns, tools=tools, add_generation_prompt=True)
    except TemplateError as error:
        raise Place("", 0).fault("template-refuses", why=error) from None
    return text


def prompt_ids(
    messages: Sequence[Message | Mapping[str, Any]],
    tokenizer: Any,
    *,
    tools: Sequence[Mapping[str, Any]] = (),
) -> list[int]:
    """The token ids of `render_prompt`; the template's text holds BOS already if it wants one."""
    text = render_prompt(messages, tokenizer, tools=tools)
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def _to_message(message: Mapping[str, Any]) -> Message:
    return read_turns([message], "messages", Place("", 0))[0]


def refuse_control_tokens(conversation: Conversation, tokenizer: Any) -> None:
    """Raise DataError where a text holds what the tokenizer reads as a control token."""
    _refuse_control_tokens(conversation, _control_tokens(tokenizer))


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts BOS before a text by itself."""
    ids = tokenizer("a", verbose=False).input_ids
    return bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id


def _tokenize_batch(
    batch: Sequence[Conversation],
    tokenizer: Any,
    *,
    spans_of: Callable[[Conversation], tuple[str, list[Span]]],
    on_bad_row: Callable[[DataError], None] | None,
) -> Iterator[Example]:
    chats: list[tuple[str, list[Span]] | None] = []
    kept: list[Conversation] = []
    for conversation in batch:
        try:
            chats.append(None if conversation.is_text else spans_of(conversation))
            kept.append(conversation)
        except DataError as error:
            if on_bad_row is None:
                raise
            on_bad_row(error)
    texts = [chat[0] for chat in chats if chat is not None]
    encoded = _encode(tokenizer, texts) if texts else iter(())
    for conversation, chat in zip(kept, chats, strict=True):
        if chat is None:
            ids = _text_ids(conversation, tokenizer)
            labels = list(ids)
        else:
            ids, offsets = next(encoded)
            labels = _spans_to_labels(ids, offsets, chat[1])
        yield Example(ids, labels, conversation.path, conversation.line, conversation.is_text)


def _control_tokens(tokenizer: Any) -> re.Pattern[str]:
    """Finds the texts that the tokenizer turns into tokens of their own and marks as special."""
    added = tokenizer.added_tokens_decoder.values()
    texts = {str(token) for token in added if token.special} | set(tokenizer.all_special_tokens)
    longest_first = sorted(filter(None, texts), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _refuse_control_tokens(conversation: Conversation, controls: re.Pattern[str]) -> None:
    parts = [
        (f"turn {number}", [message.content, message.extra])
        for number, message in enumerate(conversation.messages, start=1)
    ]
    for where, part in [*parts, ('"tools"', conversation.tools)]:
        for text in leaves(part):
            found = controls.search(text) if isinstance(text, str) else None
            if found:
                place = Place(conversation.path, conversation.line)
                raise place.fault("control-token", where=where, token=found.group())


def _encode(tokenizer: Any, texts: list[str]) -> Iterator[tuple[list[int], list[Span]]]:
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)


def _text_ids(conversation: Conversation, tokenizer: Any) -> list[int]:
    """A document's tokens with EOS at the end, once."""
    ids = list(tokenizer(conversation.messages[0].content, verbose=False).input_ids)
    eos = tokenizer.eos_token_id
    return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]


def _spans_to_labels(ids: list[int], offsets: Sequence[Span], spans: Sequence[Span]) -> list[int]:
    """Labels by overlap of each token's characters with the spans.

    A token without width (a prefix space that the tokenizer added, or white space whose offset
    it trimmed) covers what stands between its neighbours, at least its own position.
    """
    labels = [NOT_TARGET] * len(ids)
    at = 0
    covered = 0  # characters before this one are covered by earlier tokens
    for number, (start, stop) in enumerate(offsets):
        if start == stop:
            following = offsets[number + 1][0] if number + 1 < len(offsets) else stop
            start, stop = min(start, covered), max(stop, following, start + 1)
        while at < len(spans) and spans[at][1] <= start:
            at += 1
        if at < len(spans) and spans[at][0] < stop:
            labels[number] = ids[number]
        covered = max(covered, stop)
    return labels
