"""Multiple choice by likelihood: the choice that the model finds the likeliest answer.

    sum over the tokens t of a choice of log p(t | prompt, tokens before t)          acc
    the same divided by the characters of the choice                                 acc_norm

Source:
    lm-evaluation-harness, output type multiple_choice: metrics acc and acc_norm.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from nibble.data.chat import adds_bos, refuse_control_tokens, render_prompt
from nibble.data.choice import Question
from nibble.data.turns import Conversation, Message
from nibble.model.families import Head, head_of, hidden_states

# Tokens of a batch; one prompt with one choice where that is longer.
CHOICE_TOKENS = 4096
# Positions whose logits are made at once.
_HEAD_ROWS = 256


@dataclass(frozen=True)
class Candidate:
    """A prompt with one of its choices: `ids[start:]` are the choice."""

    ids: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Scored:
    """What the model makes of a question.

    Args:
        loglikelihoods: Of each choice, summed over its tokens, in nats.
        chosen: Number of the choice with the largest sum; of equals the first.
        chosen_norm: The same, with each sum divided by the characters of its choice.
    """

    question: Question
    loglikelihoods: tuple[float, ...]

    @property
    def chosen(self) -> int:
        return _largest(self.loglikelihoods)

    @property
    def chosen_norm(self) -> int:
        lengths = map(len, self.question.choices)
        return _largest([s / n for s, n in zip(self.loglikelihoods, lengths, strict=True)])


def encode_choices(question: Question, tokenizer: Any, *, plain: bool) -> list[Candidate]:
    """The tokens of every choice behind the prompt.

    Args:
        plain: The prompt is the text of the turns, and a space stands before a choice. Otherwise
            the chat template makes the prompt, and a choice is what the assistant says.

    Raises:
        DataError: If a text holds a control token, or the template refuses the turns.
    """
    said = [Message("assistant", choice) for choice in question.choices]
    turns = (*question.messages, *said)
    refuse_control_tokens(Conversation(turns, question.path, question.line), tokenizer)
    if plain:
        prompt = "\n\n".join(message.content for message in question.messages).rstrip()
        texts = [f"{prompt} {choice}" for choice in question.choices]
        first = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    else:
        prompt = render_prompt(question.messages, tokenizer)
        texts, first = [prompt + choice for choice in question.choices], []
    encoded = tokenizer([prompt, *texts], add_special_tokens=False, verbose=False)["input_ids"]
    before, *wholes = ([*first, *ids] for ids in encoded)
    # A token that is made of the end of a prompt and the start of a choice belongs to the choice.
    starts = [_num_shared(before, whole) for whole in wholes]
    return [Candidate(tuple(w), max(1, s)) for w, s in zip(wholes, starts, strict=True)]


@torch.no_grad()
def loglikelihoods(
    model: Any,
    candidates: Sequence[Sequence[Candidate]],
    *,
    max_tokens: int = CHOICE_TOKENS,
    on_done: Callable[[int], None] = lambda num_done: None,
) -> list[tuple[float, ...]]:
    """The summed log-likelihood of every choice of every question, in nats.

    Choices that differ in their last token alone are read from one document.

    Args:
        max_tokens: Of a batch.
        on_done: Gets the number of questions of each batch that ended.
    """
    model.eval()
    sums = [[0.0] * len(choices) for choices in candidates]
    for batch in _batches(candidates, max_tokens):
        for (question, choice), value in _batch_sums(model, batch):
            sums[question][choice] += value
        on_done(sum(document.is_last for document in batch))
    return [tuple(values) for values in sums]


@dataclass
class _Document:
    """Tokens that the model reads, and what is asked of them: (position, token, whose sum)."""

    ids: tuple[int, ...]
    asked: list[tuple[int, int, tuple[int, int]]]
    is_last: bool = False


def _documents(candidates: Sequence[Sequence[Candidate]]) -> Iterable[_Document]:
    for question, choices in enumerate(candidates):
        found: dict[tuple[int, ...], _Document] = {}
        for number, choice in enumerate(choices):
            ids = choice.ids[:-1]
            document = found.setdefault(ids, _Document(ids, []))
            for at in range(choice.start, len(choice.ids)):
                document.asked.append((at - 1, choice.ids[at], (question, number)))
        documents = list(found.values())
        documents[-1].is_last = True
        yield from documents


def _batches(
    candidates: Sequence[Sequence[Candidate]], max_tokens: int
) -> Iterable[list[_Document]]:
    batch: list[_Document] = []
    size = 0
    for document in _documents(candidates):
        if batch and size + len(document.ids) > max_tokens:
            yield batch
            batch, size = [], 0
        batch.append(document)
        size += len(document.ids)
    if batch:
        yield batch


@dataclass(frozen=True)
class _Packed:
    input_ids: Tensor
    position_ids: Tensor
    cu_seq_lens: Tensor


def _batch_sums(
    model: Any, documents: Sequence[_Document]
) -> Iterable[tuple[tuple[int, int], float]]:
    """Whose sum grows, and by how much, for every token asked for."""
    head = head_of(model)
    lengths = [len(document.ids) for document in documents]
    bounds = list(accumulate(lengths, initial=0))
    ids = [token for document in documents for token in document.ids]
    positions = [position for length in lengths for position in range(length)]
    packed = _Packed(
        torch.tensor([ids], device=head.weight.device),
        torch.tensor([positions], device=head.weight.device),
        torch.tensor(bounds, dtype=torch.int32),
    )
    asked = [
        (start + at, token, whose)
        for start, document in zip(bounds, documents, strict=False)
        for at, token, whose in document.asked
    ]
    read = sorted({at for at, _, _ in asked})
    states = hidden_states(model, packed, torch.tensor(read, device=head.weight.device))
    place = {at: number for number, at in enumerate(read)}
    rows = torch.tensor([place[at] for at, _, _ in asked])
    tokens = torch.tensor([token for _, token, _ in asked])
    found = _token_logprobs(states[read], head, rows, tokens)
    return zip((whose for _, _, whose in asked), found.tolist(), strict=True)


def _token_logprobs(states_ND: Tensor, head: Head, rows: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities of tokens after states, float32.

    The logit of a token is made in float32, so that choices that a rounded logit would make equal
    stay apart.

    Shapes:
        rows, tokens: (M,), rows of `states_ND` -> (M,).
    """
    device = states_ND.device
    totals = torch.cat(
        [head.logits(part).float().logsumexp(-1) for part in states_ND.split(_HEAD_ROWS)]
    )
    rows, tokens = rows.to(device), tokens.to(device)
    parts = []
    for part, ids in zip(rows.split(_HEAD_ROWS), tokens.split(_HEAD_ROWS), strict=True):
        raw = (states_ND[part].float() * head.weight[ids].float()).sum(-1) * head.logit_scale
        if head.softcap is not None:
            raw = torch.tanh(raw / head.softcap) * head.softcap
        parts.append(raw - totals[part])
    return torch.cat(parts).cpu()


def _num_shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with, the last of `other` left out."""
    pairs = zip(one, other[:-1], strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other) - 1))


def _largest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda number: values[number])
