"""`nibble eval`: held-out loss, exact match or multiple choice of a base or an adapter."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nibble.commands import progress
from nibble.commands.bases import base_options

if TYPE_CHECKING:
    from nibble.config import RunConfig
    from nibble.experiment.tasks import Outcome

TASKS = ("loss", "exact-match", "multiple-choice")
# Options that one task alone has.
_OWN = {
    "max_new_tokens": "exact-match",
    "ignore_case": "exact-match",
    "last_number": "exact-match",
    "plain": "multiple-choice",
}


def evaluate(
    model: Annotated[str, typer.Option(help="Hub id or local folder.")],
    data: Annotated[str, typer.Option(help="Examples to measure on.")],
    adapter: Annotated[str, typer.Option(help="Adapter folder.")] = "",
    method: Annotated[
        str,
        typer.Option(help="lora: 16-bit base; qlora: 4-bit base; as the adapter was trained."),
    ] = "",
    task: Annotated[str, typer.Option(help="loss, exact-match or multiple-choice.")] = "loss",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many rows.")] = None,
    predictions: Annotated[str, typer.Option(help="Write each row's answer to this file.")] = "",
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="exact-match: longest answer, 256 if not given.")
    ] = None,
    ignore_case: Annotated[
        bool, typer.Option("--ignore-case", help="exact-match: upper and lower case are the same.")
    ] = False,
    last_number: Annotated[
        bool, typer.Option("--last-number", help="exact-match: compare the last numbers.")
    ] = False,
    plain: Annotated[
        bool, typer.Option("--plain", help="multiple-choice: without the chat template.")
    ] = False,
    set_: Annotated[list[str] | None, typer.Option("--set", help="section.key=value")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print loss, perplexity and token accuracy on examples, or how many answers are right."""
    from nibble.config import load_config

    given = {
        "max_new_tokens": max_new_tokens,
        "ignore_case": ignore_case,
        "last_number": last_number,
        "plain": plain,
    }
    given = {key: value for key, value in given.items() if value}
    _check(task, given, predictions)
    quoted = [
        f"{k}={progress.to_json(v)}" for k, v in {"model.name": model, "data.train": data}.items()
    ]
    run = load_config(None, [*quoted, f"method={method or 'lora'}", *(set_ or [])])
    options = base_options(method, [Path(adapter)] if adapter else [])
    if method or not adapter:
        options = _options_of(run)
    base, tokenizer = _load(model, adapter, options)
    if task == "loss":
        values = _loss(run, base, tokenizer, limit)
    else:
        outcome = _measure(task, run, (base, tokenizer), limit, bool(predictions), given)
        _write(outcome, predictions)
        values = outcome.values
    if as_json:
        typer.echo(progress.to_json(values))
        return
    for name, value in values.items():
        typer.echo(f"{name:18} {_shown(value)}")


def _check(task: str, given: dict[str, Any], predictions: str) -> None:
    """Refuse an unknown task, and an option that would do nothing, before anything is loaded."""
    from nibble.errors import UsageError, did_you_mean

    if task not in TASKS:
        raise UsageError(
            f"--task is {task!r}, expected one of {', '.join(TASKS)}", fix=did_you_mean(task, TASKS)
        )
    for name in given:
        if _OWN[name] != task:
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag} does nothing here", fix=f"give --task {_OWN[name]}")
    if predictions and task == "loss":
        raise UsageError("--predictions does nothing here", fix="give --task exact-match")
    if predictions and not Path(predictions).absolute().parent.is_dir():
        raise UsageError(f"--predictions {predictions}: there is no such folder", fix="make it")


def _options_of(run: "RunConfig") -> dict[str, Any]:
    from nibble.train.build import base_options as of_run

    return {key: of_run(run)[key] for key in ("storage", "dtype", "quant")}


def _load(model: str, adapter: str, options: dict[str, Any]) -> tuple[Any, Any]:
    from nibble.adapter.format import read_adapter
    from nibble.model.load import load_base

    with progress.working("loading"):
        base, tokenizer = load_base(model, **options)
        if adapter:
            read_adapter(base, adapter)
    return base, tokenizer


def _loss(run: "RunConfig", base: Any, tokenizer: Any, limit: int | None) -> dict[str, Any]:
    from nibble.data.dataset import build_dataset
    from nibble.data.loader import eval_batches
    from nibble.train.evaluate import EVAL_TOKENS
    from nibble.train.evaluate import evaluate as measure

    section = run.data.model_copy(update={"packing": False, "eval": None})
    dataset = build_dataset(section, tokenizer, seed=0)
    end = measure(base, eval_batches(dataset.train[:limit], max_tokens=EVAL_TOKENS))
    return {k: v for k, v in asdict(end).items() if k not in ("step", "seconds")}


def _measure(
    task: str,
    run: "RunConfig",
    loaded: tuple[Any, Any],
    limit: int | None,
    whole: bool,
    given: dict[str, Any],
) -> "Outcome":
    from nibble.experiment.tasks import Rows, exact_match, multiple_choice
    from nibble.serve.answers import Form

    rows = Rows(run.data, limit)
    with progress.counting(task) as bar:
        if task == "multiple-choice":
            return multiple_choice(*loaded, rows, plain=given.get("plain", False), bar=bar)
        max_new_tokens = given.pop("max_new_tokens", 256)
        return exact_match(
            *loaded, rows, Form(**given), max_new_tokens=max_new_tokens, whole=whole, bar=bar
        )


def _write(outcome: "Outcome", predictions: str) -> None:
    """Say what was left out, and write the rows where they were asked for."""
    from nibble.disk import disk_errors, replace_file

    bad = outcome.bad_rows
    if bad:
        typer.echo(f"{len(bad):,} bad rows were left out; the first: {bad[0]}", err=True)
    if outcome.values["num_too_long"]:
        num = outcome.values["num_too_long"]
        typer.echo(f"{num:,} rows are longer than the context and count as wrong", err=True)
    if predictions:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in outcome.predictions]
        with disk_errors(f"cannot write {predictions}"):
            replace_file(Path(predictions), "".join(lines).encode())


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['value']:.4f} ({value['low']:.4f} to {value['high']:.4f})"
    if isinstance(value, float):
        return f"{value:,.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
