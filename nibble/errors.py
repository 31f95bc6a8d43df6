"""What can go wrong, and the exit code that says so.

    NibbleError                1   a bug of ours
    ├── UsageError             2   the command line or the config
    ├── DataError             65   a data file or one of its rows
    ├── ModelError            65   a model folder
    ├── AdapterError          65   an adapter folder
    ├── UnavailableError      69   a device, a package or the network
    ├── FolderInUseError      73   the output folder
    ├── DiskError             74   reading or writing a file
    ├── StoppedError          75   stopped on request, resumable
    ├── NonFiniteError        76   loss or gradient is not finite
    ├── OutOfMemoryError      77   the run outgrew the device
    ├── DoesNotFitError       78   the plan says it cannot fit
    └── RunInterrupted       130   Ctrl-C; resumable

Every message says what happened and where, what was expected, and how to fix it.
"""

import difflib
from collections.abc import Iterable, Mapping


class NibbleError(Exception):
    """An error that a person is meant to read.

    Args:
        what: What happened, where, and what was expected.
        fix: One sentence: what to do about it.
    """

    exit_code = 1
    # Of several processes that end alike, one says why.
    is_told = False

    def __init__(self, what: str, *, fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.what}\n  fix: {self.fix}" if self.fix else self.what


class UsageError(NibbleError):
    """A wrong command line, config key or value."""

    exit_code = 2


class DataError(NibbleError):
    """A data file or a row that cannot be used; `path` and `line` (from 1) say where."""

    exit_code = 65

    def __init__(self, what: str, *, path: str = "", line: int = 0, fix: str = "") -> None:
        where = f"{path}:{line}: " if path and line else f"{path}: " if path else ""
        super().__init__(where + what, fix=fix)
        self.reason = what
        self.path = path
        self.line = line


class ModelError(NibbleError):
    """A model folder that is incomplete, broken or of an unknown kind."""

    exit_code = 65


class AdapterError(NibbleError):
    """An adapter folder that is incomplete, broken or made for another base."""

    exit_code = 65


class UnavailableError(NibbleError):
    """A device, an optional package or the network is not there."""

    exit_code = 69


class FolderInUseError(NibbleError):
    """The output folder holds something else, or another run uses it."""

    exit_code = 73


class DiskError(NibbleError):
    """A file could not be read or written."""

    exit_code = 74


class StoppedError(NibbleError):
    """The run was asked to stop and can be continued."""

    exit_code = 75


class NonFiniteError(NibbleError):
    """The loss or a gradient is NaN or infinite; the optimizer did not move."""

    exit_code = 76


class OutOfMemoryError(NibbleError):
    """The device ran out of memory during the run."""

    exit_code = 77


class DoesNotFitError(NibbleError):
    """The plan says that the run cannot fit on the device."""

    exit_code = 78


class RunInterrupted(NibbleError):  # noqa: N818
    """Ctrl-C ended the run after a step; it can be continued."""

    exit_code = 130


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """The closest candidate as a question, or nothing.

    >>> did_you_mean("qlor", ["lora", "qlora"])
    'did you mean "qlora"?'
    """
    close = closest(name, {candidate: candidate for candidate in candidates})
    return f'did you mean "{close}"?' if close else ""


def closest(name: str, candidates: Mapping[str, str]) -> str:
    """What the spelling closest to `name` stands for, or nothing where none is close."""
    found = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return candidates[found[0]] if found else ""
