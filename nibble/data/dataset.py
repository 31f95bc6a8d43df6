"""From the data section of a run to packed rows, with a report of what became of every example.

    read -> tokenise -> split off eval -> fit -> pack      a fraction for eval
    read -> tokenise -> fit -> pack, for train and eval    a file for eval

Training rows are packed; an evaluation row is always one document, so that its loss does not
depend on `data.packing`.
"""

import hashlib
import random
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from nibble.config import DataConfig
from nibble.data.chat import Example, tokenize_all
from nibble.data.faults import fault
from nibble.data.packing import Counts, Row, cut_text, fit, pack
from nibble.data.records import read_records
from nibble.data.turns import Conversation
from nibble.errors import DataError, UsageError

# Below this share of the tokens, nearly all of the time goes into reading, not into learning.
MIN_TARGET_SHARE = 0.01

_SHOWN = 3


@dataclass(frozen=True)
class PartReport:
    """What became of the examples of one part.

    `num_documents` are the examples that are trained on (pieces of text documents count one by
    one), `num_rows` the rows they fill, `packing_efficiency` the share of `num_rows` times
    `max_seq_len` that holds tokens.
    """

    num_read: int
    num_bad: int
    num_truncated: int
    num_dropped_long: int
    num_dropped_without_target: int
    num_texts_cut: int
    num_documents: int
    num_rows: int
    num_tokens: int
    num_target_tokens: int
    packing_efficiency: float


@dataclass(frozen=True)
class DatasetReport:
    """The parts, the formats that were found, and how many eval examples are in train too."""

    train: PartReport
    eval: PartReport | None
    formats: tuple[str, ...]
    num_duplicates: int

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Dataset:
    """Rows for training and evaluation; `warnings` are sentences for a person."""

    train: list[Row]
    eval: list[Row]
    report: DatasetReport
    warnings: list[str]


@dataclass
class Source:
    """What was read for one part: conversations, their examples, the bad rows."""

    conversations: list[Conversation] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    bad_rows: list[DataError] = field(default_factory=list)

    @property
    def num_read(self) -> int:
        return len(self.examples) + len(self.bad_rows)


def build_dataset(data: DataConfig, tokenizer: Any, *, seed: int) -> Dataset:
    """Read, tokenise, split, fit and pack what a run trains on.

    Args:
        data: The data section.
        tokenizer: A fast tokenizer of transformers.
        seed: Of the split, where `data.eval` is a fraction.

    Raises:
        UsageError: `data.train` names nothing.
        DataError: A bad row with on_bad_row=stop, a long one with on_long_row=stop, or no
            target token at all.
    """
    train = read_source(data.train, tokenizer, data)
    held = Source()
    train_examples, eval_examples = train.examples, held.examples
    if isinstance(data.eval, float):
        train_examples, eval_examples = split(train.examples, data.eval, data.max_seq_len, seed)
    elif data.eval:
        held = read_source(str(data.eval), tokenizer, data)
        eval_examples = held.examples
    train_rows, train_report, warnings = _build_part("train", train, train_examples, data)
    eval_rows: list[Row] = []
    eval_report = None
    if data.eval:
        eval_rows, eval_report, more = _build_part("eval", held, eval_examples, data)
        warnings += more
    formats = [c.format for c in train.conversations + held.conversations]
    num_duplicates = count_shared(train.conversations, held.conversations)
    if num_duplicates:
        warnings.append(
            f"{num_duplicates:,} of {len(held.conversations):,} eval examples are in train too: "
            "the held-out loss flatters the model"
        )
    report = DatasetReport(train_report, eval_report, tuple(dict.fromkeys(formats)), num_duplicates)
    return Dataset(train_rows, eval_rows, report, warnings)


def read_source(
    sources: str | Sequence[str],
    tokenizer: Any,
    data: DataConfig,
    *,
    on_bad_row: Callable[[DataError], None] | None = None,
) -> Source:
    """Read and tokenise one part; `on_bad_row` overrides what the section says of bad rows."""
    names = [sources] if isinstance(sources, str) else list(sources)
    if not any(names):
        raise UsageError("no training data is named", fix="give --data FILE, or set data.train")
    found = Source()

    def collect(error: DataError) -> None:
        found.bad_rows.append(error)
        if on_bad_row is not None:
            on_bad_row(error)

    is_strict = data.on_bad_row == "stop" and on_bad_row is None
    handler = None if is_strict else collect

    def conversations() -> Iterator[Conversation]:
        for name in names:
            for conversation in read_records(name, format=data.format, on_bad_row=handler):
                found.conversations.append(conversation)
                yield conversation

    found.examples = list(
        tokenize_all(conversations(), tokenizer, train_on=data.train_on, on_bad_row=handler)
    )
    tokenized = {(example.path, example.line) for example in found.examples}
    found.conversations = [c for c in found.conversations if (c.path, c.line) in tokenized]
    return found


def split(
    examples: Sequence[Example], fraction: float, max_seq_len: int, seed: int
) -> tuple[list[Example], list[Example]]:
    """Hold out a fraction of the examples, at least one; order stays within both parts.

    Text documents are cut into pieces of `max_seq_len` first, so that one long file can be
    split. Equal examples fall on the same side.

    Raises:
        DataError: There are fewer than two different examples.
    """
    pieces = [piece for example in examples for piece in cut_text(example, max_seq_len)]
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, piece in enumerate(pieces):
        groups.setdefault(tuple(piece.input_ids), []).append(number)
    if len(groups) < 2:
        raise fault("cannot-split", found=len(groups), fraction=fraction)
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    wanted = max(1, round(fraction * len(pieces)))
    held: set[int] = set()
    for numbers in order[:-1]:
        if len(held) >= wanted:
            break
        held.update(numbers)
    kept = [piece for number, piece in enumerate(pieces) if number not in held]
    return kept, [pieces[number] for number in sorted(held)]


def count_shared(train: Sequence[Conversation], held: Sequence[Conversation]) -> int:
    """How many of `held` stand in `train` too, up to case, white space and Unicode form."""
    if not held:
        return 0
    known = {fingerprint(conversation) for conversation in train}
    return sum(fingerprint(conversation) in known for conversation in held)


def fingerprint(conversation: Conversation) -> bytes:
    """A hash of who says what, blind to case, white space and Unicode form."""
    turns = [f"{m.role}\0{_normal(m.content)}\0{m.extra or ''}" for m in conversation.messages]
    return hashlib.blake2b("\1".join(turns).encode(), digest_size=16).digest()


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _build_part(
    name: str, source: Source, examples: Sequence[Example], data: DataConfig
) -> tuple[list[Row], PartReport, list[str]]:
    if not examples:
        first = source.bad_rows[0].what if source.bad_rows else ""
        raise fault("no-target", why=f"{name} has no usable row of {source.num_read:,}; {first}")
    fitted, counts = fit(examples, data.max_seq_len, data.on_long_row)
    is_packed = data.packing and name == "train"
    rows = pack(fitted, max_seq_len=data.max_seq_len, packing=is_packed)
    warnings = [f"{name}: {sentence}" for sentence in counts.sentences()]
    if counts.places:
        shown = [f"{path}:{line} {what}" for path, line, what in counts.places[:_SHOWN]]
        warnings[0] += f" (first: {'; '.join(shown)})"
    if counts.num_target_tokens < MIN_TARGET_SHARE * counts.num_tokens:
        share = counts.num_target_tokens / counts.num_tokens
        told = f"{name}: only {share:.2%} of the tokens are targets"
        warnings.append(f"{told}: check data.train_on and the weights")
    if source.bad_rows:
        first = "; ".join(error.what for error in source.bad_rows[:_SHOWN])
        is_more = len(source.bad_rows) > _SHOWN
        more = "; `nibble data check --json` lists them all" if is_more else ""
        number = f"{len(source.bad_rows):,} of {source.num_read:,} rows"
        warnings.insert(0, f"{name}: {number} are bad and were skipped: {first}{more}")
    return rows, _report(source, rows, counts, data.max_seq_len), warnings


def _report(source: Source, rows: list[Row], counts: Counts, max_seq_len: int) -> PartReport:
    return PartReport(
        num_read=source.num_read or counts.num_examples,
        num_bad=len(source.bad_rows),
        num_truncated=counts.num_truncated,
        num_dropped_long=counts.num_dropped_long,
        num_dropped_without_target=counts.num_dropped_without_target,
        num_texts_cut=counts.num_texts_cut,
        num_documents=counts.num_kept,
        num_rows=len(rows),
        num_tokens=counts.num_tokens,
        num_target_tokens=counts.num_target_tokens,
        packing_efficiency=counts.num_tokens / (len(rows) * max_seq_len),
    )
