"""The runs of a sweep: a grid over config keys, or a list of them.

    --grid optim.lr=1e-4,2e-4 --grid lora.rank=8,16     run-1 .. run-4, the last key fastest
    --runs runs.yaml                                    one run for each item of the list

Everything is checked before anything starts; values read as those of --set.
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nibble import yamlfile
from nibble.config import RunConfig, check_run, load_config
from nibble.config_errors import short
from nibble.errors import UsageError

MOST_RUNS = 10_000
_OPENING, _CLOSING = "[{", "]}"


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
        name: Of its folder, such as run-03.
        settings: What it has of its own, by dotted key.
        run: Its whole config; `out` is decided where it runs.
    """

    name: str
    settings: dict[str, Any]
    run: RunConfig


def grid_trials(recipe: Path | None, axes: Sequence[str], overrides: Sequence[str]) -> list[Trial]:
    """Every combination of the axes, each `key=v1,v2`.

    Raises:
        UsageError: If an axis is empty, stands twice or is set besides, a key or value is wrong, or
            two runs would be the same.
    """
    given = _overridden(overrides)
    values: dict[str, list[str]] = {}
    for axis in axes:
        key, found = _split_axis(axis)
        if key in values:
            raise UsageError(f"--grid {key} stands twice", fix="give all its values in one")
        if key in given:
            raise UsageError(f"{key} is in --grid and in --set", fix="leave one of them out")
        values[key] = found
    _check_count(itertools.accumulate((len(v) for v in values.values()), lambda a, b: a * b))
    flags = [
        [f"{key}={text}" for key, text in zip(values, texts, strict=True)]
        for texts in itertools.product(*values.values())
    ]
    runs = [load_config(recipe, [*overrides, *each]) for each in flags]
    return _named([({key: run.flat()[key] for key in values}, run) for run in runs])


def listed_trials(recipe: Path | None, path: Path, overrides: Sequence[str]) -> list[Trial]:
    """A run for each mapping of dotted keys in a YAML list.

    Raises:
        UsageError: If the file is no list of mappings, a key or value is wrong or set besides, or
            two runs would be the same.
    """
    given, items = _overridden(overrides), yamlfile.read_list(path)
    _check_count([len(items)])
    base, found = load_config(recipe, overrides), list[tuple[dict[str, Any], RunConfig]]()
    for number, item in enumerate(items, start=1):
        where = f"{path}: item {number}"
        if not isinstance(item, Mapping) or not item:
            raise UsageError(
                f"{where} is {short(item)}, expected dotted keys with values",
                fix="write for example `- {optim.lr: 1e-4, lora.rank: 8}`",
            )
        settings = {str(key): value for key, value in item.items()}
        for key in settings:
            _check_key(key, f"{where}: ")
            if key in given:
                raise UsageError(f"{where}: {key} is in --set too", fix="leave one of them out")
        try:
            found.append((settings, base.with_values(settings, "file")))
        except UsageError as error:
            raise UsageError(f"{where}: {error.what}", fix=error.fix) from None
    return _named(found)


def split_values(text: str) -> list[str]:
    """The values of an axis: parted by commas outside of brackets and quotes.

    >>> split_values("all-linear,[q_proj,v_proj]")
    ['all-linear', '[q_proj,v_proj]']
    """
    return [piece.strip() for piece in _pieces(text)]


def _pieces(text: str) -> Iterator[str]:
    start, depth, quote = 0, 0, ""
    for place, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            # Within a word it is an apostrophe, as in a file's name.
            quote = letter if not text[start:place].strip() or depth else ""
        elif letter == "," and depth == 0:
            yield text[start:place]
            start = place + 1
        else:
            depth += (letter in _OPENING) - (letter in _CLOSING)
    yield text[start:]


def _split_axis(axis: str) -> tuple[str, list[str]]:
    key, equals, text = axis.partition("=")
    key = key.strip()
    example = "write for example --grid optim.lr=1e-4,2e-4"
    if not equals or not key:
        raise UsageError(f"--grid {short(axis)} is not of the form key=v1,v2", fix=example)
    _check_key(key, "--grid: ")
    values = split_values(text)
    if not all(values):
        raise UsageError(
            f"--grid {short(axis)} has an empty value", fix=f"{example}; null stands for no value"
        )
    return key, values


def _check_key(key: str, where: str) -> None:
    if key == "out":
        raise UsageError(
            f"{where}out is the folder of a run, which the sweep decides",
            fix="leave it out; --out is the folder of the sweep",
        )


def _overridden(overrides: Sequence[str]) -> set[str]:
    keys = {override.partition("=")[0].strip() for override in overrides}
    if "out" in keys:
        raise UsageError("--set out does nothing in a sweep", fix="give --out")
    return keys


def _check_count(counts: Any) -> None:
    """Refuse no runs, and more than anybody can mean, before they are made."""
    count = 0
    for count in counts:
        if count > MOST_RUNS:
            raise UsageError(f"more than {MOST_RUNS:,} runs", fix="sweep over fewer values")
    if not count:
        raise UsageError("there is nothing to sweep over", fix="give --grid key=v1,v2 or --runs")


def _named(found: Sequence[tuple[dict[str, Any], RunConfig]]) -> list[Trial]:
    """The trials with their names; each can run, and none stands twice."""
    width = len(str(len(found)))
    trials = [
        Trial(f"run-{number:0{width}}", settings, run)
        for number, (settings, run) in enumerate(found, start=1)
    ]
    seen: dict[str, Trial] = {}
    for trial in trials:
        try:
            check_run(trial.run)
        except UsageError as error:
            what = f"{trial.name} ({said(trial.settings)}): {error.what}"
            raise UsageError(what, fix=error.fix) from None
        values = {key: value for key, value in trial.run.flat().items() if key != "out"}
        first = seen.setdefault(json.dumps(values), trial)
        if first is not trial:
            raise UsageError(
                f"{first.name} ({said(first.settings)}) and {trial.name} "
                f"({said(trial.settings)}) are the same run",
                fix="leave one of them out",
            )
    return trials


def said(settings: Mapping[str, Any]) -> str:
    """Settings as a person reads them.

    >>> said({"optim.lr": 1e-4, "lora.target": ["q_proj"]})
    'optim.lr=0.0001 lora.target=["q_proj"]'
    """
    return " ".join(
        f"{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in settings.items()
    )
