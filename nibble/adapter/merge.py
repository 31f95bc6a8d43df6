"""Merge an adapter into its base, measure the result, and give it a certificate.

    write      the weights, into a folder beside the one that is asked for
    measure    base, live and merged model on held-out rows, one in memory at a time
    judge      outside the bounds nothing is left; else the folder gets its name

With `auto` every target is written and measured, and that of the lowest loss stays.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nibble.adapter.agreement import Predictions, compare, held_out_batches, predict
from nibble.adapter.card import model_card
from nibble.adapter.certificate import CERTIFICATE_FILE, Certificate, Measured
from nibble.adapter.format import read_adapter, read_base_options
from nibble.adapter.merged_weights import MergeBase, open_merge, to_json, write_weights
from nibble.data.loader import Batch
from nibble.data.packing import Row
from nibble.disk import disk_errors, make_folder, remove, rename, sync_tree, write_file
from nibble.errors import AdapterError, FolderInUseError
from nibble.model.adapt import updates_off
from nibble.model.files import find_model
from nibble.model.load import load_base
from nibble.model.tokenizer import load_tokenizer

# How a base is kept where neither the adapter nor the caller says so.
_OPTIONS: dict[str, Any] = {"storage": "bf16", "dtype": torch.bfloat16, "quant": {}}
_COPIED = ("generation_config.json",)


@dataclass(frozen=True)
class Merge:
    """What is to be merged.

    Args:
        adapter: An adapter folder.
        model: Folder or hub id of its base.
        revision: Of a hub id.
        options: How the base was kept in training: `storage`, `dtype`, `quant` of `load_base`.
        rows: Held-out rows; none leaves the merge unmeasured.
    """

    adapter: Path
    model: str
    revision: str | None
    options: dict[str, Any]
    rows: Sequence[Row] = ()


def base_options_of(
    adapter: Path, known: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, Any]:
    """How the base of an adapter was kept: as is given, as the adapter says, as is known."""
    return {**_OPTIONS, **known, **read_base_options(adapter), **given}


def merge(
    job: Merge,
    out: Path,
    onto: str = "auto",
    *,
    anyway: bool = False,
    tell: Callable[[str], None] = lambda what: None,
) -> Certificate:
    """Write the merged model into a new folder, with its certificate.

    Args:
        onto: One of `merged_weights.TARGETS`, or "auto": the one with the lowest held-out loss;
            without held-out rows, what the adapter was trained on.
        anyway: Keep a model that is outside the bounds.
        tell: Receives what is done next, for a person.

    Raises:
        UsageError: If the target is unknown, or of no use for this base.
        FolderInUseError: If `out` is there and not empty.
        AdapterError: If adapter and base do not belong together, or the bounds are not kept.
        ModelError, DiskError: If the base is broken, or a file cannot be written.
    """
    with disk_errors(f"cannot use the output folder {out}"):
        if out.is_file() or (out.is_dir() and any(out.iterdir())):
            raise FolderInUseError(f"{out} is not empty", fix="choose another --out")
    base = open_merge(find_model(job.model, job.revision), job.adapter)
    known = base.targets(job.options["storage"])
    targets = known if onto == "auto" and job.rows else [known[0] if onto == "auto" else onto]
    live = _measure_live(job, tell) if job.rows else None
    best: Certificate | None = None
    losses: dict[str, float] = {}
    try:
        for target in targets:
            made = _write(job, base, out, target, tell)
            made = _measured(job, made, live, _beside(out, target), tell)
            losses[target] = _rank(made)[1]
            best, other = (
                (made, best) if best is None or _rank(made) < _rank(best) else (best, made)
            )
            if other is not None:
                remove(_beside(out, other.onto))
        assert best is not None, "there is a target"
        best = replace(best, candidates=losses if len(losses) > 1 else {})
        if best.problems and not anyway:
            raise AdapterError("; ".join(best.problems), fix=_advice(best, known))
        _finish(job, best, _beside(out, best.onto), out)
    finally:
        for target in targets:
            remove(_beside(out, target))
    return best


def _rank(made: Certificate) -> tuple[bool, float]:
    """What keeps its update first, then the lower loss."""
    loss = float("inf") if made.measured is None else made.measured.merged.loss
    return made.rounding.is_lost, loss


def _advice(made: Certificate, known: Sequence[str]) -> str:
    others = [target for target in known if target != made.onto and target not in made.candidates]
    first = f"merge onto {' or '.join(others[:2])}" if others else "serve the adapter as it is"
    return f"{first}, or keep this model with --anyway"


def _beside(out: Path, target: str) -> Path:
    return out.with_name(f".{out.name}.{target}.tmp")


def _write(
    job: Merge, base: MergeBase, out: Path, target: str, tell: Callable[[str], None]
) -> Certificate:
    tell(f"merging onto {target}")
    folder = _beside(out, target)
    with disk_errors(f"cannot write the merged model {out}"):
        remove(folder)
        make_folder(folder)
    rounding = write_weights(base, folder, target, job.options)
    return Certificate(
        adapter=str(job.adapter),
        base=job.model,
        onto=target,
        trained_on=job.options["storage"],
        is_same_base=target == base.targets(job.options["storage"])[0],
        rounding=rounding,
    )


@dataclass(frozen=True)
class _Live:
    """Base and adapter on the held-out batches."""

    batches: list[Batch]
    predictions: Predictions
    base_loss: float
    loss: float


def _measure_live(job: Merge, tell: Callable[[str], None]) -> _Live:
    tell("measuring the adapter on its base")
    batches = held_out_batches(job.rows)
    model, _ = load_base(job.model, revision=job.revision, device=_device(), **job.options)
    read_adapter(model, job.adapter)
    live = predict(model, batches)
    with updates_off(model):
        base = predict(model, batches)
    loss = compare(live, live).loss
    return _Live(batches, live, compare(live, base).loss, loss)


def _measured(
    job: Merge, made: Certificate, live: _Live | None, folder: Path, tell: Callable[[str], None]
) -> Certificate:
    if live is None:
        return made
    tell(f"measuring the model merged onto {made.onto}")
    gc.collect()  # modules are cycles; the model before this one would stay
    is_low = made.onto.startswith("4bit")
    low = job.options["storage"] if job.options["storage"] in ("nf4", "fp4") else "nf4"
    dense = "float32" if job.options["dtype"] == torch.float32 else "bf16"
    _write_tokenizer(job, folder)
    model, _ = load_base(
        str(folder),
        low if is_low else dense,
        dtype=job.options["dtype"],
        device=_device(),
    )
    agreement = compare(live.predictions, predict(model, live.batches))
    return replace(made, measured=Measured(live.base_loss, live.loss, agreement))


def _write_tokenizer(job: Merge, folder: Path) -> None:
    """The tokenizer and the chat template of training, or those of the base."""
    source = find_model(job.model, job.revision)
    own = (job.adapter / "tokenizer_config.json").is_file()
    load_tokenizer(job.adapter if own else source).save_pretrained(folder)


def _finish(job: Merge, made: Certificate, folder: Path, out: Path) -> None:
    """The files beside the weights; then the folder gets its name."""
    source = find_model(job.model, job.revision)
    body = f"# {Path(job.model).name} with an adapter merged in\n\n{made.sentence()}\n\n"
    card = model_card(
        job.model, body=f"{body}Merged with nibble; see `{CERTIFICATE_FILE}`.", is_merged=True
    )
    with disk_errors(f"cannot write the merged model {out}"):
        _write_tokenizer(job, folder)
        for name in _COPIED:
            if (source / name).is_file():
                write_file(folder / name, [(source / name).read_bytes()])
        write_file(folder / "README.md", [card.encode()])
        write_file(folder / CERTIFICATE_FILE, [to_json(made.to_dict())])
        sync_tree(folder)
        remove(out)
        rename(folder, out)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
