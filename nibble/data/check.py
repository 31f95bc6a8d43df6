"""What `nibble data check` reports, before anything is spent on training.

Decoded rows with the trained part marked, lengths, what each cut-off would cost, duplicates
within and between train and eval, and every bad row with line, reason and fix.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from typing import Any

import numpy as np

from nibble.data.chat import NOT_TARGET, Example, tokenize_all
from nibble.data.dataset import fingerprint
from nibble.data.records import read_records
from nibble.data.turns import Conversation
from nibble.errors import DataError

CUT_OFFS = (256, 512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True)
class CheckSettings:
    """How the data would be read: the same keys as in the config's section `data`."""

    format: str
    max_seq_len: int
    train_on: str
    num_rows_shown: int = 3


@dataclass(frozen=True)
class BadRow:
    """Where a row stands, what is wrong with it, what to do."""

    path: str
    line: int
    reason: str
    fix: str


@dataclass(frozen=True)
class CutOff:
    """What cutting conversations after `max_seq_len` tokens would cost."""

    max_seq_len: int
    num_rows_cut: int
    share_of_rows: float
    share_of_target_tokens_lost: float
    num_rows_without_target: int


@dataclass(frozen=True)
class Bin:
    """Rows whose length is at least `low` and below `high` tokens."""

    low: int
    high: int
    num_rows: int


@dataclass(frozen=True)
class ShownRow:
    """A decoded row in parts (text, is it trained)."""

    path: str
    line: int
    parts: list[tuple[str, bool]]

    def marked(self) -> str:
        """The text with what is trained between double brackets."""
        return "".join(f"[[{text}]]" if is_trained else text for text, is_trained in self.parts)


@dataclass
class PartReport:
    """Train or eval: its rows, tokens and lengths (in tokens)."""

    paths: list[str]
    format: str = ""
    num_rows: int = 0
    num_tokens: int = 0
    num_target_tokens: int = 0
    num_rows_without_target: int = 0
    num_empty_answers: int = 0
    median_len: int = 0
    longest_len: int = 0
    histogram: list[Bin] = field(default_factory=list)
    cut_offs: list[CutOff] = field(default_factory=list)
    bad_rows: list[BadRow] = field(default_factory=list)
    rows: list[ShownRow] = field(default_factory=list)


@dataclass(frozen=True)
class Duplicates:
    """Rows that say the same up to case, white space and Unicode form; counted exactly.

    `num_within_*` counts every row after the first of its kind. `num_eval_in_train` counts eval
    rows that stand in train, `num_eval_prompts_in_train` those whose prompt does.
    """

    num_within_train: int = 0
    num_within_eval: int = 0
    num_eval_in_train: int = 0
    num_eval_prompts_in_train: int = 0


@dataclass
class DataReport:
    """Everything that the check found; `to_dict` is the JSON document."""

    train: PartReport
    eval: PartReport | None
    duplicates: Duplicates
    settings: CheckSettings

    @property
    def is_good(self) -> bool:
        """No bad row, and something to learn in each part."""
        parts = [part for part in (self.train, self.eval) if part is not None]
        return all(not part.bad_rows and part.num_target_tokens for part in parts)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, with `version` 1."""
        return {"version": 1, "is_good": self.is_good, **asdict(self)}


def check_data(
    train: str | Sequence[str],
    eval: str | Sequence[str] | None,
    tokenizer: Any,
    settings: CheckSettings,
) -> DataReport:
    """Read, render and count; bad rows are collected and never raised.

    Args:
        train: File or hub id, or several.
        eval: The same for held-out rows, or None.
        tokenizer: Of the model.
        settings: As the run would have them.

    Raises:
        DataError: A file that cannot be read at all.
        UnavailableError: A package or the network is not there.
    """
    train_part, train_rows = _check_part(_as_list(train), tokenizer, settings)
    if eval is None:
        duplicates = _count_duplicates(train_rows, [])
        return DataReport(train_part, None, duplicates, settings)
    eval_part, eval_rows = _check_part(_as_list(eval), tokenizer, settings)
    duplicates = _count_duplicates(train_rows, eval_rows)
    return DataReport(train_part, eval_part, duplicates, settings)


def _as_list(source: str | Sequence[str]) -> list[str]:
    return [source] if isinstance(source, str) else list(source)


def _check_part(
    paths: list[str], tokenizer: Any, settings: CheckSettings
) -> tuple[PartReport, list[Conversation]]:
    part = PartReport(paths)

    def on_bad_row(error: DataError) -> None:
        part.bad_rows.append(BadRow(error.path, error.line, error.reason, error.fix))

    rows: list[Conversation] = []
    for path in paths:
        rows += read_records(path, format=settings.format, on_bad_row=on_bad_row)
    examples = list(
        tokenize_all(rows, tokenizer, train_on=settings.train_on, on_bad_row=on_bad_row)
    )
    part.format = ", ".join(sorted({row.format for row in rows}))
    part.num_empty_answers = sum(_has_empty_answer(row) for row in rows)
    shown = examples[: settings.num_rows_shown]
    part.rows = [show(_head(e, settings.max_seq_len), tokenizer) for e in shown]
    _count_tokens(part, examples, settings.max_seq_len)
    return part, rows


def _head(example: Example, max_seq_len: int) -> Example:
    """What fits in a row: a text file is as long as it likes."""
    ids, labels = example.input_ids[:max_seq_len], example.labels[:max_seq_len]
    return replace(example, input_ids=ids, labels=labels)


def _has_empty_answer(row: Conversation) -> bool:
    return any(
        m.role == "assistant" and not m.content.strip() and not m.extra.get("tool_calls")
        for m in row.messages
    )


def _count_tokens(part: PartReport, examples: list[Example], max_seq_len: int) -> None:
    lens = np.array([len(example.input_ids) for example in examples], dtype=np.int64)
    targets = [_target_places(example) for example in examples]
    part.num_rows = len(examples)
    part.num_tokens = int(lens.sum())
    part.num_target_tokens = sum(len(places) for places in targets)
    part.num_rows_without_target = sum(len(places) == 0 for places in targets)
    if not examples:
        return
    part.median_len = int(np.median(lens))
    part.longest_len = int(lens.max())
    part.histogram = _histogram(lens)
    chats = [
        (len(example.input_ids), places)
        for example, places in zip(examples, targets, strict=True)
        if not example.is_text
    ]
    edges = sorted({*CUT_OFFS, max_seq_len})
    part.cut_offs = [_cut_off(chats, edge, part.num_target_tokens) for edge in edges]


def _target_places(example: Example) -> np.ndarray:
    """Positions of the targets that something stands before."""
    places = np.flatnonzero(np.array(example.labels) != NOT_TARGET)
    return places[places > 0]


def _histogram(lens: np.ndarray) -> list[Bin]:
    """Bins from one power of two to the next: 1, 2, 4, 8 ... tokens."""
    bins = Counter(int(length).bit_length() for length in lens)
    return [
        Bin(2 ** (bits - 1), 2**bits, bins[bits])
        for bits in range(max(1, min(bins)), max(bins) + 1)
    ]


def _cut_off(chats: Sequence[tuple[int, np.ndarray]], max_seq_len: int, num_targets: int) -> CutOff:
    cut = [places for length, places in chats if length > max_seq_len]
    lost = sum(int((places >= max_seq_len).sum()) for places in cut)
    emptied = sum(bool(len(places)) and not (places < max_seq_len).any() for places in cut)
    return CutOff(
        max_seq_len=max_seq_len,
        num_rows_cut=len(cut),
        share_of_rows=len(cut) / len(chats) if chats else 0.0,
        share_of_target_tokens_lost=lost / num_targets if num_targets else 0.0,
        num_rows_without_target=int(emptied),
    )


def show(example: Example, tokenizer: Any) -> ShownRow:
    """Decode runs of tokens that are all targets or all not."""
    pairs = zip(example.input_ids, example.labels, strict=True)
    parts = [
        (tokenizer.decode([token for token, _ in run]), is_trained)
        for is_trained, run in groupby(pairs, key=lambda pair: pair[1] != NOT_TARGET)
    ]
    return ShownRow(example.path, example.line, parts)


def _count_duplicates(train: Iterable[Conversation], eval: Iterable[Conversation]) -> Duplicates:
    in_train = [_fingerprints(row) for row in train]
    in_eval = [_fingerprints(row) for row in eval]
    whole = {row for row, _ in in_train}
    prompts = {prompt for _, prompt in in_train}
    return Duplicates(
        num_within_train=len(in_train) - len(whole),
        num_within_eval=len(in_eval) - len({row for row, _ in in_eval}),
        num_eval_in_train=sum(row in whole for row, _ in in_eval),
        num_eval_prompts_in_train=sum(prompt in prompts for _, prompt in in_eval),
    )


def _fingerprints(row: Conversation) -> tuple[bytes, bytes]:
    """Hashes of the whole row and of its user turns."""
    asked = tuple(m for m in row.messages if m.role in ("user", "text"))
    return fingerprint(row), fingerprint(replace(row, messages=asked))
