"""Examples to Rows: cut or drop what is too long, then join short documents.

    row        | document 0      | document 1  |
    position   | 0 1 2 3 4 5 6 7 | 0 1 2 3 4 5 |
    segment    | 0 0 0 0 0 0 0 0 | 1 1 1 1 1 1 |
    label      | x . . . . t t t | x . . . t t |   x: never a target, nothing stands before it

Everything is a function of the input alone: the same examples give the same rows.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from nibble.data.chat import NOT_TARGET, Example
from nibble.data.faults import fault

Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Row:
    """One or more documents laid end to end.

    Shapes:
        input_ids, labels, position_ids, segment_ids: (S,), int64. Labels are not shifted and
        the first of each document is -100; positions restart at 0 with each document.
    """

    input_ids: Ids
    labels: Ids
    position_ids: Ids
    segment_ids: Ids

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def doc_lens(self) -> list[int]:
        """The lengths of the documents, in order."""
        return np.bincount(self.segment_ids).tolist()

    @property
    def num_target_tokens(self) -> int:
        return int((self.labels != NOT_TARGET).sum())


@dataclass
class Counts:
    """What `fit` did with the examples; `places` are (path, line, what happened) of the changed."""

    num_examples: int = 0
    num_kept: int = 0
    num_truncated: int = 0
    num_dropped_long: int = 0
    num_dropped_without_target: int = 0
    num_texts_cut: int = 0
    num_tokens: int = 0
    num_target_tokens: int = 0
    places: list[tuple[str, int, str]] = field(default_factory=list)

    def sentences(self) -> list[str]:
        """What happened to rows, for a person; nothing where all were kept whole."""
        told = [
            (self.num_truncated, "cut at data.max_seq_len"),
            (self.num_dropped_long, "dropped: longer than data.max_seq_len"),
            (self.num_dropped_without_target, "dropped: no target token within data.max_seq_len"),
            (self.num_texts_cut, "text documents cut into pieces, no token lost"),
        ]
        return [f"{count:,} of {self.num_examples:,} rows {what}" for count, what in told if count]


def fit(
    examples: Iterable[Example], max_seq_len: int, on_long_row: str = "truncate"
) -> tuple[list[Example], Counts]:
    """Bring every example to at most `max_seq_len` tokens and count what happened.

    A text document is cut into pieces that together hold every token once. A conversation is
    cut at its end, dropped, or refused. An example without a target left is dropped: it would
    train nothing.

    Args:
        examples: As tokenised.
        max_seq_len: Tokens, at least 2.
        on_long_row: truncate | drop | stop.

    Raises:
        DataError: A row is too long and `on_long_row` is stop, or no target token is left.
    """
    counts = Counts()
    fitted: list[Example] = []
    path = ""
    for example in examples:
        path = path or example.path
        counts.num_examples += 1
        for piece in _fit_one(example, max_seq_len, on_long_row, counts):
            num_targets = _num_targets(piece.labels)
            if num_targets or example.is_text:
                fitted.append(piece)
                counts.num_target_tokens += num_targets
            else:
                counts.num_dropped_without_target += 1
                _note(counts, example, "dropped: no target token")
    counts.num_kept = len(fitted)
    counts.num_tokens = sum(len(example.input_ids) for example in fitted)
    if not counts.num_target_tokens:
        why = "; ".join(counts.sentences()) or f"{counts.num_examples} rows"
        raise fault("no-target", path=path, why=why)
    return fitted, counts


def pack(examples: Iterable[Example], *, max_seq_len: int, packing: bool = True) -> list[Row]:
    """Lay documents into rows of at most `max_seq_len` tokens.

    Best fit: from the longest document down, each goes into the fullest row that still has
    room. Without `packing` each document is a row and their order stays.

    Raises:
        ValueError: A document is longer than `max_seq_len`; `fit` comes first.
    """
    documents = [example for example in examples if example.input_ids]
    for example in documents:
        if len(example.input_ids) > max_seq_len:
            raise ValueError(f"a document of {len(example.input_ids)} tokens > {max_seq_len}")
    if not packing:
        return [_documents_to_row([example]) for example in documents]
    lens = [len(example.input_ids) for example in documents]
    return [
        _documents_to_row([documents[i] for i in numbers])
        for numbers in _best_fit(lens, max_seq_len)
    ]


def cut_text(example: Example, max_seq_len: int) -> list[Example]:
    """The pieces of a text document that is too long; any other example as it is."""
    found = len(example.input_ids)
    if not example.is_text or found <= max_seq_len:
        return [example]
    return [_slice(example, at, at + max_seq_len) for at in range(0, found, max_seq_len)]


def _fit_one(
    example: Example, max_seq_len: int, on_long_row: str, counts: Counts
) -> Iterator[Example]:
    found = len(example.input_ids)
    if found <= max_seq_len:
        yield example
    elif example.is_text:
        counts.num_texts_cut += 1
        yield from cut_text(example, max_seq_len)
    elif on_long_row == "truncate":
        counts.num_truncated += 1
        _note(counts, example, f"cut from {found} tokens to {max_seq_len}")
        yield _slice(example, 0, max_seq_len)
    elif on_long_row == "drop":
        counts.num_dropped_long += 1
        _note(counts, example, f"dropped: {found} tokens")
    else:
        raise fault(
            "too-long", path=example.path, line=example.line, found=found, limit=max_seq_len
        )


def _slice(example: Example, start: int, stop: int) -> Example:
    return replace(
        example, input_ids=example.input_ids[start:stop], labels=example.labels[start:stop]
    )


def _note(counts: Counts, example: Example, what: str) -> None:
    counts.places.append((example.path, example.line, what))


def _num_targets(labels: Sequence[int]) -> int:
    """Targets that something stands before."""
    return sum(label != NOT_TARGET for label in labels[1:])


def _best_fit(lens: Sequence[int], capacity: int) -> list[list[int]]:
    """Numbers of the documents of each row.

    `free` has bit r set while some row has room for r more tokens, so the fullest row with
    room for n is the lowest set bit of `free >> n`: with rooms 3 and 6, free = 0b1001000,
    free >> 4 = 0b100, lowest bit 2, room 4 + 2 = 6.
    """
    order = sorted(range(len(lens)), key=lambda i: -lens[i])
    rows: list[list[int]] = []
    rows_by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    free = 0
    for i in order:
        fitting = free >> lens[i]
        if fitting:
            room = lens[i] + (fitting & -fitting).bit_length() - 1
            row = rows_by_room[room].pop()
            if not rows_by_room[room]:
                free &= ~(1 << room)
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(i)
        rest = room - lens[i]
        rows_by_room[rest].append(row)
        free |= 1 << rest
    return rows


def _documents_to_row(documents: Sequence[Example]) -> Row:
    labels = [np.array(document.labels, dtype=np.int64) for document in documents]
    for document_labels in labels:
        document_labels[0] = NOT_TARGET
    lens = [len(document.input_ids) for document in documents]
    return Row(
        input_ids=np.concatenate([np.array(d.input_ids, dtype=np.int64) for d in documents]),
        labels=np.concatenate(labels),
        position_ids=np.concatenate([np.arange(n, dtype=np.int64) for n in lens]),
        segment_ids=np.repeat(np.arange(len(lens), dtype=np.int64), lens),
    )
