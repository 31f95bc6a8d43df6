"""What a plan says of the same work on other GPUs, and the smallest one that does it."""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nibble.config import RunConfig
from nibble.data.dataset import build_dataset
from nibble.disk import disk_errors, replace_file
from nibble.errors import NibbleError, UnavailableError
from nibble.experiment.compare import Comparison
from nibble.model.files import find_tokenizer
from nibble.model.tokenizer import load_tokenizer
from nibble.plan.advise import Question, advise
from nibble.plan.devices import DEVICES, Device, find_device
from nibble.plan.estimate import cost
from nibble.plan.plan import model_values
from nibble.plan.rows import Rows, full_rows, rows_of
from nibble.train.manifest import environment

SHOWN = ("T4", "RTX 4090", "L40S", "A100 80GB", "H100 SXM 80GB")
PROJECTION_FILE = "projection.json"


@dataclass(frozen=True)
class OnDevice:
    """A method on a device that is not here: as planned, nothing was run.

    Attributes:
        needed_bytes: What has to fit, the margin for holes included.
        cost: Of the run at the example price of the device in USD; None without one.
    """

    method: str
    device: str
    memory_bytes: int
    fits: bool
    needed_bytes: int
    step_seconds: float
    total_seconds: float | None
    cost: float | None
    is_smallest: bool = False


def project(comparison: Comparison, place: Path) -> list[OnDevice]:
    """Every method on the devices of `SHOWN`, and on the smallest of the table that it fits.

    What was planned once by the same code for the same comparison is read from `PROJECTION_FILE`.
    A method that cannot be planned is left out: its runs have said why.

    Raises:
        DiskError: If the file cannot be written.
    """
    made_for = {"code": environment()["code"], **comparison.to_dict()}
    path = place / PROJECTION_FILE
    found = _read(path, made_for)
    if found is None:
        found = []
        for run in comparison.runs.values():
            with suppress(NibbleError):
                found += list(_of_method(run))
        values = {"made_for": made_for, "found": [asdict(one) for one in found]}
        with disk_errors(f"cannot write {path}"):
            replace_file(path, (json.dumps(values, indent=2) + "\n").encode())
    return found


def _read(path: Path, made_for: dict[str, Any]) -> list[OnDevice] | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        is_same = values["made_for"] == made_for
        return [OnDevice(**one) for one in values["found"]] if is_same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _of_method(run: RunConfig) -> Iterator[OnDevice]:
    values, rows = model_values(run), _rows(run)

    def on(device: Device) -> OnDevice:
        return _on_device(Question(run, values, rows, device))

    yield from (on(find_device(name)) for name in SHOWN)
    # More memory never fits less: the first that fits is found by halving.
    ordered = sorted(DEVICES, key=lambda device: (device.memory_bytes, device.name))
    low, high = 0, len(ordered)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if on(ordered[middle]).fits else (middle + 1, high)
    if low < len(ordered):
        yield OnDevice(**{**asdict(on(ordered[low])), "is_smallest": True})


def _rows(run: RunConfig) -> Rows:
    try:
        tokenizer = load_tokenizer(find_tokenizer(run.model.name))
    except UnavailableError:
        return full_rows(run)
    return rows_of(build_dataset(run.data, tokenizer, seed=run.train.seed), run)


def _on_device(question: Question) -> OnDevice:
    device, choice = question.device, advise(question)
    forecast = choice.forecast
    steps = question.rows.num_steps
    total = forecast.step_seconds * steps if steps else None
    price = device.price_per_hour
    has_cost = choice.fits and total is not None and price is not None
    return OnDevice(
        method=forecast.option.method,
        device=device.name,
        memory_bytes=device.memory_bytes,
        fits=choice.fits,
        needed_bytes=forecast.needed_bytes,
        step_seconds=forecast.step_seconds,
        total_seconds=total,
        cost=cost(total, price, "1s") if has_cost and total and price else None,
    )
