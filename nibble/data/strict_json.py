"""JSON as rows need it: no key twice, no NaN, at most MAX_DEPTH levels, every error a fault."""

import json
from collections import Counter
from collections.abc import Iterable
from typing import Any, NoReturn

from nibble.data.faults import fault
from nibble.errors import DataError

# A row needs about ten levels; the limit of the interpreter depends on who calls.
MAX_DEPTH = 100


def parse(text: str, path: str = "", line: int = 0) -> object:
    """The one value that a text holds.

    Raises:
        DataError: It is not JSON, or holds what a row may not hold.
    """
    value, end = _decode(text, 0, path, line)
    if end != len(text):
        raise fault("several-values", path=path, line=line, column=end + 1)
    if _is_deep(text, 0, end, value):
        raise fault("json-too-deep", path=path, line=line, limit=MAX_DEPTH)
    return value


def parse_element(text: str, at: int, path: str, line: int) -> tuple[object, int]:
    """The value that begins at `at`, on this line, and where it ends.

    A value that is JSON but may not stand in a row is the DataError itself.

    Raises:
        DataError: It is not JSON, so that its end is unknown.
    """
    try:
        value, end = _decode(text, at, path, line)
    except DataError as error:
        return error, _end(text, at, path, line)
    if _is_deep(text, at, end, value):
        return fault("json-too-deep", path=path, line=line, limit=MAX_DEPTH), end
    return value, end


def json_fault(error: Exception, path: str, line: int) -> DataError:
    """The fault for what a decoder raised; `line` is where its text starts."""
    if isinstance(error, RecursionError):
        return fault("json-too-deep", path=path, line=line, limit=MAX_DEPTH)
    if isinstance(error, json.JSONDecodeError):
        line += error.lineno - 1
        return fault("bad-json", path=path, line=line, column=error.colno, why=error.msg)
    return fault("huge-number", path=path, line=line)


def first_twice(names: Iterable[str]) -> str:
    """The first name that stands twice, or nothing."""
    return next((name for name, count in Counter(names).items() if count > 1), "")


def _decode(text: str, at: int, path: str, line: int) -> tuple[Any, int]:
    try:
        return _decoder(path, line).raw_decode(text, at)
    except DataError:
        raise
    except json.JSONDecodeError as error:
        raise json_fault(error, path, 1 if at else line) from None
    except (ValueError, RecursionError) as error:
        raise json_fault(error, path, line) from None


def _decoder(path: str, line: int) -> json.JSONDecoder:
    def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if len(row) != len(pairs):
            key = first_twice(key for key, _ in pairs)
            raise fault("duplicate-key", path=path, line=line, key=key)
        return row

    def constant(value: str) -> NoReturn:
        raise fault("json-number", path=path, line=line, value=value)

    return json.JSONDecoder(object_pairs_hook=object_of, parse_constant=constant)


def _end(text: str, at: int, path: str, line: int) -> int:
    """Where a value ends, read without the checks."""
    try:
        return json.JSONDecoder().raw_decode(text, at)[1]
    except json.JSONDecodeError as error:
        raise json_fault(error, path, 1) from None
    except (ValueError, RecursionError) as error:
        raise json_fault(error, path, line) from None


def _is_deep(text: str, start: int, end: int, value: object) -> bool:
    """Whether a value has more than MAX_DEPTH levels; few brackets tell at once that it has not."""
    if text.count("[", start, end) + text.count("{", start, end) <= MAX_DEPTH:
        return False
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level for inner in _inner(outer)]
    return bool(level)


def _inner(value: object) -> list[object]:
    """The objects and lists that stand directly in a value."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [part for part in parts if isinstance(part, dict | list)]
