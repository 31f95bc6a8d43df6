"""Files to rows: JSON, CSV, Parquet and hub data sets, each row with its line number.

A reader yields (line, row). Where a row cannot be read but the next one can, the row is the
DataError itself; where the rest of the file is lost, the error is raised.
"""

import codecs
import csv
import io
import json
import os
import re
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

from nibble.data.faults import fault
from nibble.errors import DataError, UnavailableError, did_you_mean

_SPACE = re.compile(r"[ \t\r\n]*")
_DATA_EXTRA = "pip install 'nibble[data]'"


def refuse_bad_file(path: Path, suffixes: Mapping[str, str]) -> None:
    """Raise for a file that is missing, a folder, empty, unreadable or of an unknown ending."""
    name = str(path)
    if not path.exists():
        near = sorted(p.name for p in path.parent.glob("*")) if path.parent.is_dir() else []
        hint = did_you_mean(path.name, near)
        raise fault("missing-file", path=name, hint=f", {hint}" if hint else "")
    if path.is_dir():
        files = [p.name for p in sorted(path.iterdir()) if p.suffix.lower() in suffixes]
        raise fault("is-folder", path=name, files=", ".join(files[:8]) or "(none is usable)")
    if path.suffix.lower() not in suffixes:
        raise fault("unknown-suffix", path=name, suffix=path.suffix, known=" ".join(suffixes))
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise fault("unreadable-file", path=name, why=error.strerror) from None
    if start.removeprefix(codecs.BOM_UTF8) == b"" and path.stat().st_size <= 3:
        raise fault("empty-file", path=name)
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise fault("utf16", path=name, line=1)


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
    with path.open("rb") as file:
        first = next((raw for raw in file if raw.removeprefix(codecs.BOM_UTF8).strip()), b"")
    start = first.removeprefix(codecs.BOM_UTF8).strip()
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


def _rows_of_lines(path: Path) -> Iterator[tuple[int, object]]:
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            if raw.removeprefix(codecs.BOM_UTF8).strip(b" \t\r\n"):
                yield line, _row_of_line(raw, str(path), line)


def _row_of_line(raw: bytes, path: str, line: int) -> object:
    """The row, or the DataError that says why there is none."""
    try:
        return _parse(decode(raw, path, line).strip(" \t\r\n"), path, line)
    except DataError as error:
        return error


def _parse(text: str, path: str, line: int) -> object:
    try:
        row, end = _decoder(path, line).raw_decode(text)
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise _json_fault(error, path, line) from None
    if end != len(text):
        raise fault("several-values", path=path, line=line, column=end + 1)
    return row


def _decoder(path: str, line: int) -> json.JSONDecoder:
    def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if len(row) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise fault("duplicate-key", path=path, line=line, key=twice)
        return row

    def constant(value: str) -> NoReturn:
        raise fault("json-number", path=path, line=line, value=value)

    return json.JSONDecoder(object_pairs_hook=object_of, parse_constant=constant)


def _json_fault(error: Exception, path: str, line: int) -> DataError:
    """The fault for what the decoder raised; `line` is where its text starts."""
    if isinstance(error, RecursionError):
        return fault("json-too-deep", path=path, line=line)
    if isinstance(error, json.JSONDecodeError):
        line += error.lineno - 1
        return fault("bad-json", path=path, line=line, column=error.colno, why=error.msg)
    return fault("huge-number", path=path, line=line)


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
        row, at = _element(text, at, name)
        yield line, row
        at = _after_comma(text, at, name)
    end = _skip(text, at + 1)
    if not is_wrapped and end != len(text):
        line, column = _place(text, end)
        raise fault("trailing-text", path=name, line=line, column=column)


def _element(text: str, at: int, path: str) -> tuple[object, int]:
    line, _ = _place(text, at) if at < len(text) else (text.count("\n") + 1, 0)
    if at >= len(text):
        raise fault("array-not-closed", path=path, line=line)
    try:
        return _decoder(path, line).raw_decode(text, at)
    except DataError as error:  # a fault inside: find the end without the checks
        return error, json.JSONDecoder().raw_decode(text, at)[1]
    except json.JSONDecodeError as error:
        raise _json_fault(error, path, 1) from None
    except (ValueError, RecursionError) as error:
        raise _json_fault(error, path, line) from None


def _after_comma(text: str, at: int, path: str) -> int:
    at = _skip(text, at)
    if at >= len(text):
        raise fault("array-not-closed", path=path, line=text.count("\n") + 1)
    if text[at] == "]":
        return at
    line, column = _place(text, at)
    if text[at] != ",":
        raise fault("array-comma", path=path, line=line, column=column)
    at = _skip(text, at + 1)
    if text.startswith("]", at):
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
        raise _json_fault(error, path, 1) from None
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
    raw_lines = path.read_bytes().split(b"\n")
    text = "\n".join(decode(raw, name, n) for n, raw in enumerate(raw_lines, start=1))
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    line = 1
    try:
        for fields in reader:
            start, line = line, reader.line_num + 1
            if not fields:
                continue
            if not header:
                header = _header(fields, name, start)
            else:
                yield start, _fields_to_row(fields, header, name, start)
    except csv.Error as error:
        raise fault("bad-csv", path=name, line=line, why=error) from None


def _header(fields: list[str], path: str, line: int) -> list[str]:
    names = [field.strip() for field in fields]
    for column, name in enumerate(names, start=1):
        if not name:
            raise fault("csv-no-name", path=path, line=line, column=column)
        if names.count(name) > 1:
            raise fault("csv-same-name", path=path, line=line, key=name)
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
            batches = (batch.to_pylist() for batch in file.iter_batches(batch_size=1024))
            for row in chain.from_iterable(batches):
                line += 1
                yield line, row
    except (pyarrow.ArrowException, OSError) as error:
        why = str(error).split("\n")[0][:200]
        raise fault("bad-parquet", path=str(path), line=line, why=why) from None


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
