"""`nibble data check`: look at the data as the model will see it."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from nibble.data.check import DataReport, PartReport, ShownRow

app = typer.Typer(no_args_is_help=True, help="Look at data before training on it.")

_MAX_BAD_ROWS = 20


@app.callback()
def data() -> None:
    """Look at data before training on it."""


@app.command()
def check(
    file: Annotated[list[str], typer.Argument(help="Training rows: files or hub ids.")],
    model: Annotated[str, typer.Option(help="Hub id or folder; its chat template is used.")],
    *,
    eval_data: Annotated[str | None, typer.Option(help="Held-out rows.")] = None,
    max_seq_len: Annotated[int | None, typer.Option(help="As data.max_seq_len.")] = None,
    train_on: Annotated[str | None, typer.Option(help="As data.train_on.")] = None,
    format: Annotated[str | None, typer.Option(help="As data.format.")] = None,
    rows: Annotated[int, typer.Option(min=0, help="Decoded rows to show.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Format, mask, lengths, truncation, duplicates and every bad row of a data set.

    Exit code 65 where a row is bad or nothing is a target.
    """
    import json

    from rich.console import Console

    from nibble.config import DataConfig
    from nibble.data.check import CheckSettings, check_data

    given = {"max_seq_len": max_seq_len, "train_on": train_on, "format": format}
    config = _section(DataConfig, {key: value for key, value in given.items() if value is not None})
    settings = CheckSettings(config.format, config.max_seq_len, config.train_on, rows)
    with Console(stderr=True).status("reading and tokenising"):
        report = check_data(file, eval_data, load_tokenizer(model), settings)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), ensure_ascii=False))
    else:
        _print_report(report, Console(soft_wrap=True, highlight=False))
    if not report.is_good:
        raise typer.Exit(65)


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a folder or hub id.

    Raises:
        ModelError: The folder has no usable tokenizer.
        UsageError: There is no such folder, and the name is no hub id.
        UnavailableError: The hub does not give it.
    """
    from nibble.model.files import find_tokenizer
    from nibble.model.tokenizer import load_tokenizer as load

    return load(find_tokenizer(model))


def _section(section: Any, given: dict[str, Any]) -> Any:
    """A config section from flags, with the section's own defaults and checks."""
    from pydantic import ValidationError

    from nibble.errors import UsageError

    try:
        return section(**given)
    except ValidationError as error:
        first = error.errors()[0]
        flag = "--" + str(first["loc"][0]).replace("_", "-")
        raise UsageError(
            f"{flag} {first['input']}: {first['msg']}", fix="nibble data check --help"
        ) from None


def _print_report(report: "DataReport", console: "Console") -> None:
    parts = [("train", report.train)]
    if report.eval is not None:
        parts.append(("eval", report.eval))
    for name, part in parts:
        _print_part(name, part, console)
    _print_duplicates(report, console)
    for _, part in parts:
        _print_bad_rows(part, console)
    console.print("good" if report.is_good else "not good: see above", style="bold")


def _print_part(name: str, part: "PartReport", console: "Console") -> None:
    from rich.markup import escape

    console.print(f"{name}: {escape(', '.join(part.paths))}", style="bold")
    console.print(f"  format {part.format or 'unknown'}, {part.num_rows:,} rows")
    share = part.num_target_tokens / part.num_tokens if part.num_tokens else 0.0
    console.print(
        f"  {part.num_tokens:,} tokens, {part.num_target_tokens:,} of them trained ({share:.1%}); "
        f"median {part.median_len:,}, longest {part.longest_len:,} a row"
    )
    if part.num_empty_answers:
        console.print(f"  {part.num_empty_answers:,} rows with an empty answer")
    if part.num_rows_without_target:
        console.print(f"  {part.num_rows_without_target:,} rows without a target")
    for row in part.rows:
        console.print(f"\n  row at {escape(row.path)}:{row.line}, the trained part marked:")
        console.print(_marked_text(row, console))
    console.print("\n  tokens a row")
    most = max((b.num_rows for b in part.histogram), default=1)
    for b in part.histogram:
        bar = "#" * round(40 * b.num_rows / most)
        console.print(f"  {b.low:>9,} to {b.high - 1:>9,} {b.num_rows:>9,} {bar}")
    console.print(
        "\n  cut at      rows cut            trained tokens lost    rows left without any"
    )
    for cut in part.cut_offs:
        console.print(
            f"  {cut.max_seq_len:>6,} {cut.num_rows_cut:>9,} ({cut.share_of_rows:6.1%})"
            f" {cut.share_of_target_tokens_lost:>22.1%} {cut.num_rows_without_target:>22,}"
        )
    console.print()


def _marked_text(row: "ShownRow", console: "Console") -> "Text":
    """The trained part in colour on a terminal, between double brackets elsewhere."""
    from rich.text import Text

    if not console.is_terminal or console.no_color:
        return Text(row.marked())
    text = Text()
    for part, is_trained in row.parts:
        text.append(part, style="bold green" if is_trained else "dim")
    return text


def _print_duplicates(report: "DataReport", console: "Console") -> None:
    found = report.duplicates
    console.print("duplicates, up to case and white space", style="bold")
    console.print(f"  within train: {found.num_within_train:,} rows")
    if report.eval is not None:
        console.print(f"  within eval: {found.num_within_eval:,} rows")
        console.print(
            f"  eval rows that stand in train: {found.num_eval_in_train:,}; "
            f"whose question does: {found.num_eval_prompts_in_train:,}"
        )
    console.print()


def _print_bad_rows(part: "PartReport", console: "Console") -> None:
    from rich.markup import escape

    if not part.bad_rows:
        return
    console.print(f"{len(part.bad_rows):,} bad rows", style="bold red")
    for bad in part.bad_rows[:_MAX_BAD_ROWS]:
        console.print(escape(f"  {bad.path}:{bad.line}: {bad.reason}\n    fix: {bad.fix}"))
    if len(part.bad_rows) > _MAX_BAD_ROWS:
        console.print(f"  ... and {len(part.bad_rows) - _MAX_BAD_ROWS:,} more (all with --json)")
    console.print()
