"""Files to rows: JSON, CSV, Parquet and hub data sets, each row with its line number.

A reader yields (line, row). Where a row cannot be read but the next one can, the row is the
DataError itself; where the rest of the file is lost, the error is raised.
"""

import codecs
import csv
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nibble.data.faults import fault
from nibble.data.strict_json import first_twice, json_fault, parse, parse_element
from nibble.errors import DataError, UnavailableError, did_you_mean

# A line is held in memory whole, with its text and its row beside it.
MAX_LINE_BYTES = 64 * 2**20

_SPACE = re.compile(r"[ \t\r\n]*")
_DATA_EXTRA = "pip install 'nibble[data]'"
_PACKED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".zip")
_PACKED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
}


def refuse_bad_file(path: Path, suffixes: Mapping[str, str]) -> None:
    """Raise for a path that is no file, and for a file whose first bytes show it is unusable."""
    name = str(path)
    try:
        _refuse_no_file(path, suffixes)
        with path.open("rb") as file:
            start = file.read(6)
        size = path.stat().st_size
    except OSError as error:
        raise fault("unreadable-file", path=name, why=error.strerror) from None
    packed = next((kind for magic, kind in _PACKED.items() if start.startswith(magic)), "")
    if packed:
        raise fault("packed-file", path=name, found=packed)
    if start.removeprefix(codecs.BOM_UTF8) == b"" and size <= 3:
        raise fault("empty-file", path=name)
    if _is_utf16(start):
        raise fault("utf16", path=name, line=1)


def _refuse_no_file(path: Path, suffixes: Mapping[str, str]) -> None:
    name = str(path)
    if not path.exists():
        near = sorted(p.name for p in path.parent.glob("*")) if path.parent.is_dir() else []
        hint = did_you_mean(path.name, near)
        raise fault("missing-file", path=name, hint=f", {hint}" if hint else "")
    if path.is_dir():
        files = [p.name for p in sorted(path.iterdir()) if p.suffix.lower() in suffixes]
        raise fault("is-folder", path=name, files=", ".join(files[:8]) or "(none is usable)")
    if not path.is_file():  # opening a pipe would wait for a writer
        raise fault("not-regular", path=name)
    suffix = path.suffix.lower()
    if suffix in _PACKED_SUFFIXES:
        raise fault("packed-file", path=name, found=suffix)
    if suffix not in suffixes:
        raise fault("unknown-suffix", path=name, suffix=path.suffix, known=" ".join(suffixes))


def _is_utf16(start: bytes) -> bool:
    """UTF-16 or UTF-32 by its byte order mark, or by every other byte of ASCII being zero."""
    has_mark = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE))
    return has_mark or (len(start) > 1 and (start[0] == 0) != (start[1] == 0))


def decode(raw: bytes, path: str, line: int) -> str:
    """One line as text; a byte order mark goes from the first."""
    if line == 1:
        raw = raw.removeprefix(codecs.BOM_UTF8)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise fault(
            "bad-utf8", path=path, line=line, column=error.start + 1, byte=raw[error.start]
        ) from None


def rows_of_json(path: Path) -> Iterator[tuple[int, object]]:
    """The rows of JSONL, of an array, or (in .json) of {"data": [...]}; the content decides."""
    contents = (_content(raw, line) for line, raw in _lines(path))
    start = next((content for content in contents if content), b"")
    is_json = path.suffix.lower() == ".json"
    if start.startswith(b"[") or (is_json and _is_wrapped(start)):
        yield from _rows_of_array(path)
    else:
        yield from _rows_of_lines(path)


def _is_wrapped(first_line: bytes) -> bool:
    """Whether a first line is {"data": [...]}, or begins an object over many lines."""
    if not first_line.startswith(b"{"):
        return False
    try:
        row = json.loads(first_line)
    except (ValueError, RecursionError):
        return True
    return isinstance(row.get("data"), list)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers; of one that is too long, its first MAX_LINE_BYTES + 1 bytes."""
    size = MAX_LINE_BYTES + 1
    with path.open("rb") as file:
        line = 0
        while raw := file.readline(size):
            line += 1
            yield line, raw
            while len(raw) == size and not raw.endswith(b"\n"):
                raw = file.readline(size)


def _content(raw: bytes, line: int) -> bytes:
    """A line without white space around it, the first without its byte order mark."""
    return (raw.removeprefix(codecs.BOM_UTF8) if line == 1 else raw).strip(b" \t\r\n")


def _rows_of_lines(path: Path) -> Iterator[tuple[int, object]]:
    for line, raw in _lines(path):
        if content := _content(raw, line):
            yield line, _row_of_line(content, raw, str(path), line)


def _row_of_line(content: bytes, raw: bytes, path: str, line: int) -> object:
    """The row, or the DataError that says why there is none."""
    if len(raw) > MAX_LINE_BYTES:
        return fault("long-line", path=path, line=line, limit=MAX_LINE_BYTES)
    if content.startswith(codecs.BOM_UTF8):
        return fault("inner-bom", path=path, line=line)
    try:
        return parse(decode(raw, path, line).strip(" \t\r\n"), path, line)
    except DataError as error:
        return error


def _rows_of_array(path: Path) -> Iterator[tuple[int, object]]:
    """The elements of the array, each read by itself so that its line is known."""
    name = str(path)
    raw_lines = path.read_bytes().split(b"\n")
    text = "\n".join(decode(raw, name, n) for n, raw in enumerate(raw_lines, start=1))
    at = _skip(text, 0)
    is_wrapped = text[at] == "{"
    if is_wrapped:
        at = _find_data(text, at, name)
    at, line, counted = _skip(text, at + 1), 1, 0
    while not text.startswith("]", at):
        line, counted = line + text.count("\n", counted, at), at
        if at >= len(text):
            raise fault("array-not-closed", path=name, line=line)
        row, at = parse_element(text, at, name, line)
        yield line, row
        at = _after_comma(text, at, name)
    end = _skip(text, at + 1)
    if not is_wrapped and end != len(text):
        line, column = _place(text, end)
        raise fault("trailing-text", path=name, line=line, column=column)


def _after_comma(text: str, at: int, path: str) -> int:
    at = _skip(text, at)
    if at >= len(text):
        raise fault("array-not-closed", path=path, line=text.count("\n") + 1)
    if text[at] == "]":
        return at
    if text[at] != ",":
        line, column = _place(text, at)
        raise fault("array-comma", path=path, line=line, column=column)
    comma, at = at, _skip(text, at + 1)
    if text.startswith("]", at):
        line, column = _place(text, comma)
        raise fault("bad-json", path=path, line=line, column=column, why="comma before ]")
    return at


def _find_data(text: str, at: int, path: str) -> int:
    """The position of the [ of "data" in the object that opens at `at`."""
    decoder = json.JSONDecoder()
    try:
        at = _skip(text, at + 1)
        while not text.startswith("}", at):
            key, at = decoder.raw_decode(text, at)
            at = _expect(text, at, ":")
            if key == "data" and text.startswith("[", at):
                return at
            _, at = decoder.raw_decode(text, at)
            if not text.startswith("}", _skip(text, at)):
                at = _expect(text, at, ",")
            else:
                at = _skip(text, at)
    except (ValueError, RecursionError) as error:
        raise json_fault(error, path, 1) from None
    raise fault("not-array", path=path, line=1, found="an object")


def _expect(text: str, at: int, sign: str) -> int:
    """The position of what follows `sign` and white space."""
    at = _skip(text, at)
    if not text.startswith(sign, at):
        raise json.JSONDecodeError(f"Expecting '{sign}'", text, at)
    return _skip(text, at + 1)


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _place(text: str, at: int) -> tuple[int, int]:
    """Line and column from 1."""
    return text.count("\n", 0, at) + 1, at - (text.rfind("\n", 0, at) + 1) + 1


def rows_of_csv(path: Path) -> Iterator[tuple[int, object]]:
    """The rows under the header; a row's line is the one it begins on."""
    name = str(path)
    lines, bad_lines = _text_lines(path)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] = []
    line = 1
    try:
        for fields in reader:
            start, line = line, reader.line_num + 1
            bad = next((bad_lines[n] for n in range(start, line) if n in bad_lines), None)
            if not header and bad:
                raise bad
            if not header:
                header = _header(fields, name, start) if fields else []
            elif fields:
                yield start, bad or _fields_to_row(fields, header, name, start)
    except csv.Error as error:  # what follows may stand within quotes or not
        raise fault("bad-csv", path=name, line=line, seen=reader.line_num, why=error) from None


def _text_lines(path: Path) -> tuple[list[str], dict[int, DataError]]:
    """The lines as text, and by number the faults of those that are not UTF-8."""
    lines: list[str] = []
    bad: dict[int, DataError] = {}
    for number, raw in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        try:
            lines.append(decode(raw, str(path), number))
        except DataError as error:
            bad[number] = error
            lines.append(raw.decode("utf-8", "replace"))
    return lines, bad


def _header(fields: list[str], path: str, line: int) -> list[str]:
    names = [field.strip() for field in fields]
    if "" in names:
        raise fault("csv-no-name", path=path, line=line, column=names.index("") + 1)
    if twice := first_twice(names):
        raise fault("csv-same-name", path=path, line=line, key=twice)
    if len(names) == 1 and re.search(r"[;\t|]", names[0]):
        raise fault("csv-delimiter", path=path, line=line, key=names[0])
    return names


def _fields_to_row(fields: list[str], header: list[str], path: str, line: int) -> object:
    if len(fields) != len(header):
        return fault("csv-fields", path=path, line=line, found=len(fields), expected=len(header))
    return dict(zip(header, fields, strict=True))


def rows_of_parquet(path: Path) -> Iterator[tuple[int, object]]:
    """The rows of a Parquet file; `line` is the number of the row."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UnavailableError(
            f"{path}: reading Parquet needs the package pyarrow, which is not installed",
            fix=_DATA_EXTRA,
        ) from None
    line = 0
    try:
        with parquet.ParquetFile(path) as file:
            if twice := first_twice(file.schema_arrow.names):
                raise fault("parquet-same-name", path=str(path), key=twice)
            for row in _rows_of_batches(file.iter_batches(batch_size=1024), str(path)):
                line += 1
                yield line, row
    except (pyarrow.ArrowException, OSError) as error:
        why = str(error).split("\n")[0][:200]
        raise fault("bad-parquet", path=str(path), line=line, why=why) from None


def _rows_of_batches(batches: Iterator[Any], path: str) -> Iterator[object]:
    """The rows of all batches; one by one where a value of a batch has no form in Python."""
    start = 1
    for batch in batches:
        try:
            yield from batch.to_pylist()
        except (ValueError, ArithmeticError):
            for number in range(batch.num_rows):
                yield _row_of_batch(batch.slice(number, 1), path, start + number)
        start += batch.num_rows


def _row_of_batch(row: Any, path: str, line: int) -> object:
    try:
        return row.to_pylist()[0]
    except (ValueError, ArithmeticError) as error:
        return fault("bad-parquet-row", path=path, line=line, why=error)


def rows_of_hub(source: str) -> Iterator[tuple[int, object]]:
    """The rows of a hub data set `owner/name[:split]` (split: train)."""
    name, _, split = source.partition(":")
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UnavailableError(
            f'"{source}" is no file here; reading it from the hub needs the package datasets',
            fix=f"{_DATA_EXTRA}, or name a local file",
        ) from None
    try:
        rows = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # datasets raises a dozen kinds, from HTTP to cache
        offline = os.environ.get("HF_HUB_OFFLINE") in ("1", "true", "TRUE", "ON", "YES")
        state = "the hub is switched off (HF_HUB_OFFLINE)" if offline else "the hub said"
        why = str(error).split("\n")[0][:200]
        raise UnavailableError(
            f'"{source}" is no file here and not to be had from the hub: {state}: {why}',
            fix="check the name and the network, or name a local file",
        ) from None
    yield from enumerate(rows, start=1)
