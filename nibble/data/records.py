"""Read a data file into Conversations, each with its line.

    .jsonl .ndjson .json   one object a line, or an array, or {"data": [...]}: told by content
    .csv .tsv              a header and rows, fields as Python's csv reads them
    .parquet               needs the extra `data`
    .txt .md               one document, cut into rows later; no token is lost
    anything else that looks like `owner/name`: a data set of the Hugging Face hub

A row that is wrong is a DataError naming file, line, reason and fix: raised, or handed to
`on_bad_row`. Blank lines of JSONL are no rows; a UTF-8 byte order mark and CRLF are accepted.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from nibble.data.containers import (
    decode,
    refuse_bad_file,
    rows_of_csv,
    rows_of_hub,
    rows_of_json,
    rows_of_parquet,
)
from nibble.data.faults import fault
from nibble.data.formats import FORMATS as FORMATS
from nibble.data.formats import check_format_name, row_to_conversation
from nibble.data.formats import detect_format as detect_format
from nibble.data.turns import Conversation as Conversation
from nibble.data.turns import Message as Message
from nibble.data.turns import Place, kind
from nibble.errors import DataError

SUFFIXES = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
    ".md": "text",
}

T = TypeVar("T")
Row = tuple[int, object]
"""A line number from 1 and what stands there, or the DataError that says why nothing does."""


def read_records(
    source: str | Path,
    *,
    format: str = "auto",
    on_bad_row: Callable[[DataError], None] | None = None,
) -> Iterator[Conversation]:
    """The examples of one file or hub data set, in order.

    Args:
        source: A path, or a hub id such as `owner/name` or `owner/name:split`.
        format: auto | messages | alpaca | sharegpt | prompt-completion | text.
        on_bad_row: Gets the error of each bad row, and reading goes on; without it the first
            bad row is raised. A file that cannot be read at all is always raised.

    Raises:
        DataError: A bad file or row.
        UnavailableError: A package, the network or a hub data set is not there.
    """
    check_format_name(format)
    path, rows = _open(str(source))
    if rows is None:
        yield from _readable(_text_document(path), path)
        return
    count = 0
    first: tuple[str, int] | None = None
    for line, row in _readable(rows, path):
        count += 1
        try:
            conversation = _row_to_conversation(row, format, path, line)
            first = first or (conversation.format, line)
            if conversation.format != first[0]:
                raise _mixed(conversation, *first)
        except DataError as error:
            if on_bad_row is None:
                raise
            on_bad_row(error)
            continue
        yield conversation
    if count == 0:
        raise fault("no-rows", path=path)


def read_rows(
    source: str | Path, *, on_bad_row: Callable[[DataError], None] | None = None
) -> Iterator[tuple[Place, Mapping[str, Any]]]:
    """The rows of one file or hub data set as they stand, each with its place.

    Args:
        source: As `read_records` takes it, but no plain text.
        on_bad_row: Gets the error of each row that cannot be read, and reading goes on.

    Raises:
        DataError: A bad file, or a row that is no object.
    """
    path, rows = _open(str(source))
    if rows is None:
        known = " ".join(suffix for suffix, name in SUFFIXES.items() if name != "text")
        raise fault("unknown-suffix", path=path, suffix=Path(path).suffix, known=known)
    count = 0
    for line, row in _readable(rows, path):
        count += 1
        place = Place(path, line)
        if isinstance(row, Mapping) and row:
            yield place, row
            continue
        error = row if isinstance(row, DataError) else _no_columns(row, place)
        if on_bad_row is None:
            raise error
        on_bad_row(error)
    if count == 0:
        raise fault("no-rows", path=path)


def _no_columns(row: object, place: Place) -> DataError:
    if isinstance(row, Mapping):
        return place.fault("empty-row")
    return place.fault("not-object", found=kind(row))


def _open(source: str) -> tuple[str, Iterator[Row] | None]:
    """The name to show and the rows, or None for a plain text file."""
    path = Path(source)
    with suppress(RuntimeError):  # ~name of nobody is a name like any other
        path = path.expanduser()
    if not _exists(path) and _looks_like_hub_id(source):
        return source, rows_of_hub(source)
    refuse_bad_file(path, SUFFIXES)
    container = SUFFIXES[path.suffix.lower()]
    if container == "text":
        return str(path), None
    readers = {"json": rows_of_json, "csv": rows_of_csv, "parquet": rows_of_parquet}
    return str(path), readers[container](path)


def _exists(path: Path) -> bool:
    """Whether something is there, as far as one may look; `refuse_bad_file` says why not."""
    try:
        return path.exists()
    except OSError:
        return True


def _readable(items: Iterator[T], path: str) -> Iterator[T]:
    """The items as they are; a disk that fails is a fault of the file."""
    try:
        yield from items
    except OSError as error:
        raise fault("unreadable-file", path=path, why=error.strerror or error) from None


def _looks_like_hub_id(source: str) -> bool:
    name = source.split(":")[0]
    has_suffix = Path(name).suffix.lower() in SUFFIXES
    is_path = source.startswith((".", "/", "~")) or "\\" in source or name.count("/") > 1
    return bool(name) and not has_suffix and not is_path and "/" in name


def _row_to_conversation(row: object, format: str, path: str, line: int) -> Conversation:
    if isinstance(row, DataError):
        raise row
    return row_to_conversation(row, format=format, path=path, line=line)


def _mixed(conversation: Conversation, first: str, first_line: int) -> DataError:
    return fault(
        "mixed-formats",
        path=conversation.path,
        line=conversation.line,
        found=conversation.format,
        first=first,
        first_line=first_line,
    )


def _text_document(path: str) -> Iterator[Conversation]:
    """The whole file as one document; line ends become newlines."""
    lines = Path(path).read_bytes().splitlines(keepends=True)
    parts = [decode(raw, path, line) for line, raw in enumerate(lines, start=1)]
    text = "".join(parts).replace("\r\n", "\n")
    if not text.strip():
        raise fault("empty-file", path=path)
    for line, part in enumerate(parts, start=1):
        if "\0" in part:
            raise fault("nul", path=path, line=line, where="the line")
    message = Message("text", text)
    yield Conversation(messages=(message,), path=path, line=1, is_text=True, format="text")
