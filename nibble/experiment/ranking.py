"""What came out of a sweep: the runs by their loss, the best of them, and the files that say so."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from nibble.disk import disk_errors, replace_file
from nibble.experiment.sweep import Row

REPORT_FILE = "report.json"
TABLE_FILE = "sweep.csv"
Criterion = Literal["eval_loss", "train_loss"]
# Runs that differ here measure their losses on other tokens.
_OTHER_TOKENS = ("model.name", "model.revision", "data.")


@dataclass(frozen=True)
class Result:
    """What came out of one run.

    Attributes:
        state: As in `sweep.Row`.
        settings: What it has of its own, by dotted key.
        train_loss: Of its last step, in nats per target token; None unless it is finished.
        eval_loss: The last held-out loss; of a run that was stopped early, at that step.
        adapter: The folder of what it trained.
        sha256: Of the weights in there, by file.
        reason: Why it is not finished.
    """

    name: str
    state: str
    settings: dict[str, Any]
    steps: int
    train_loss: float | None
    eval_loss: float | None
    seconds: float | None
    tokens: int | None
    peak_memory_bytes: int | None
    predicted_memory_bytes: int | None
    device: str
    adapter: str
    sha256: dict[str, str]
    reason: str
    exit_code: int


@dataclass(frozen=True)
class Ranking:
    """The runs of a sweep in order, the best first.

    Attributes:
        by: What decides: held-out loss where all finished runs have one, else training loss.
        winner: The name of the best finished run; empty where none is finished.
        notes: What a person should know when comparing.
    """

    results: list[Result]
    by: Criterion
    winner: str
    notes: list[str]

    def named(self, name: str) -> Result:
        """The result of a run."""
        return next(result for result in self.results if result.name == name)

    def to_dict(self) -> dict[str, Any]:
        """As the report has it, but for the version of its form."""
        winner = {}
        if self.winner:
            best = self.named(self.winner)
            winner = {"name": best.name, "settings": best.settings, "adapter": best.adapter}
        return {
            "sorted_by": self.by,
            "winner": winner or None,
            "notes": self.notes,
            "runs": [asdict(result) for result in self.results],
        }


def rank(rows: Sequence[Row]) -> Ranking:
    """The runs by loss: finished ones, then those that were stopped early, then the others."""
    results = [_result(row) for row in rows]
    finished = [result for result in results if result.state == "finished"]
    has_eval = bool(finished) and all(result.eval_loss is not None for result in finished)
    by: Criterion = "eval_loss" if has_eval else "train_loss"
    groups = {"finished": 0, "stopped early": 1}
    # One that was left behind later comes before one that was left behind earlier.
    order = sorted(
        results,
        key=lambda r: (
            groups.get(r.state, 2),
            -r.steps if r.state == "stopped early" else 0,
            _or_last(r.eval_loss if r.state == "stopped early" else getattr(r, by)),
        ),
    )
    winner = order[0].name if finished else ""
    return Ranking(order, by, winner, _notes(rows, by, has_finished=bool(finished)))


def write_ranking(out: Path, ranking: Ranking) -> None:
    """Write report.json and sweep.csv.

    Raises:
        DiskError: If they cannot be written.
    """
    text = json.dumps({"version": 1, **ranking.to_dict()}, indent=2, ensure_ascii=False)
    with disk_errors(f"cannot write the report into {out}"):
        replace_file(out / REPORT_FILE, f"{text}\n".encode())
        replace_file(out / TABLE_FILE, _csv(ranking).encode())


def _result(row: Row) -> Result:
    followed, trial = row.followed, row.planned.trial
    is_finished = row.state == "finished"
    end = followed.end if is_finished else None
    is_lost = row.lost_at is not None
    eval_loss = followed.eval_losses.get(row.lost_at or 0) if is_lost else followed.eval_loss
    # The folder may have been moved since the run wrote where its adapter is.
    adapter = str(followed.out / Path(end.adapter).name) if end is not None else ""
    return Result(
        name=row.name,
        state=row.state,
        settings=trial.settings,
        steps=row.lost_at or followed.step,
        train_loss=followed.loss if is_finished else None,
        eval_loss=eval_loss,
        seconds=end.seconds if end is not None else None,
        tokens=end.tokens if end is not None else None,
        peak_memory_bytes=end.peak_memory_bytes if end is not None else None,
        predicted_memory_bytes=end.predicted_peak_memory_bytes if end is not None else None,
        device=row.place,
        adapter=adapter,
        sha256=end.adapter_sha256 if end is not None else {},
        reason=_reason(row),
        exit_code=row.exit_code,
    )


def _reason(row: Row) -> str:
    if row.lost_at is not None:
        return f"the better half went on at step {row.lost_at}"
    return row.reason if row.state != "finished" else ""


def _or_last(loss: float | None) -> float:
    return float("inf") if loss is None else loss


def _notes(rows: Sequence[Row], by: Criterion, *, has_finished: bool) -> list[str]:
    notes = []
    if has_finished and by == "train_loss":
        notes.append("Sorted by training loss of the last step: nothing is held out in every run.")
    flats = [row.planned.trial.run.flat() for row in rows]
    differing = {key for key in flats[0] if len({json.dumps(flat[key]) for flat in flats}) > 1}
    others = {key for key in differing if key.startswith(_OTHER_TOKENS)}
    if isinstance(flats[0]["data.eval"], float):
        others |= differing & {"train.seed"}
    chosen = sorted({row.planned.run.method for row in rows if row.state == "finished"})
    if len(chosen) > 1 and "method" not in differing:
        notes.append(f"Their plans chose different methods: {' and '.join(chosen)}.")
    if others:
        listed = ", ".join(sorted(others))
        notes.append(f"Runs differ in {listed}: their losses are means over other tokens.")
    return notes


def _csv(ranking: Ranking) -> str:
    keys = list(dict.fromkeys(key for result in ranking.results for key in result.settings))
    plain = [name for name in Result.__dataclass_fields__ if name not in ("settings", "sha256")]
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(["name", *keys, *plain[1:]])
    for result in ranking.results:
        own = [_cell(result.settings, key) for key in keys]
        writer.writerow([result.name, *own, *(getattr(result, name) for name in plain[1:])])
    return file.getvalue()


def _cell(settings: Mapping[str, Any], key: str) -> Any:
    value = settings.get(key, "")
    return value if isinstance(value, str | int | float) else json.dumps(value)
