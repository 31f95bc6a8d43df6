"""`nibble plan`: LoRA or QLoRA on a device, every byte predicted, nothing loaded."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nibble.commands import progress
from nibble.environment import quick_imports
from nibble.units import counted, gigabytes

if TYPE_CHECKING:
    from nibble.plan.plan import Plan

BAR_WIDTH = 40
# Parts below this share of the peak are left out of the table; --json has them.
SMALLEST_SHARE = 0.002
PLOT_SUFFIXES = (".png", ".svg", ".pdf")


def plan(
    recipe: Annotated[Path | None, typer.Argument(help="YAML file; flags override it.")] = None,
    model: Annotated[str, typer.Option(help="Folder, hub id or preset: llama-2-7b.")] = "",
    data: Annotated[list[str] | None, typer.Option(help="Training examples.")] = None,
    eval_data: Annotated[str, typer.Option(help="Held-out examples, or a fraction.")] = "",
    device: Annotated[str, typer.Option(help='"RTX 4090", "2x A100 80GB", cpu or here.')] = "",
    memory: Annotated[str, typer.Option(help="Instead of a device: 24GiB.")] = "",
    method: Annotated[str, typer.Option(help="lora, qlora, full or auto.")] = "",
    set_: Annotated[list[str] | None, typer.Option("--set", help="section.key=value")] = None,
    price: Annotated[float | None, typer.Option(help="USD per hour of one device.")] = None,
    billing: Annotated[str, typer.Option(help="Unit that time is charged in: 15min.")] = "",
    plot: Annotated[Path | None, typer.Option(help="Write the memory by part as PNG.")] = None,
    history: Annotated[bool, typer.Option(help="Show how right past plans were.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say whether a run fits a device, by which method and settings, and why; exit 78 if not."""
    if history:
        _print_history(as_json)
        return
    from nibble.config import check_named, load_config
    from nibble.errors import UsageError

    if device and memory:
        raise UsageError("--device and --memory exclude each other", fix="give one of them")
    flags = {"model.name": model, "data.eval": eval_data, "method": method}
    run = load_config(recipe, [*progress.overrides(flags, data), *(set_ or [])])
    check_named(run)

    from nibble.plan.devices import find_device, parse_memory

    if memory:
        parse_memory(memory)
    chosen = find_device(memory or device or "here")

    with quick_imports():
        from nibble.plan.plan import Charge, make_plan

    if plot is not None:
        _check_plot(plot)
    charge = None
    if price is not None or billing:
        price = chosen.price_per_hour if price is None else price
        charge = Charge(price, billing or Charge.billing)
    with progress.working("planning"):
        made, _ = make_plan(run, chosen, charge=charge)
    if as_json:
        typer.echo(progress.to_json(made.to_dict()))
    else:
        _print_plan(made)
    if plot is not None:
        _draw(made, plot)
    if not made.fits:
        raise typer.Exit(made.error().exit_code)


def _print_plan(plan: "Plan") -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    verdict = "fits" if plan.fits else "does not fit"
    title = escape(f"{plan.model} on {plan.device}: {plan.method} {verdict}")
    console.print(f"[bold]{title}[/bold]\n")
    table = Table.grid(padding=(0, 2))
    for name, value in _lines(plan):
        table.add_row(f"[dim]{name}[/dim]", escape(value))
    console.print(table)
    console.print("\n[dim]at the peak[/dim]")
    parts = Table.grid(padding=(0, 2))
    shown = [
        item
        for item in plan.parts.items()
        if abs(item[1]) >= SMALLEST_SHARE * plan.peak_memory_bytes
    ]
    for part, size in sorted(shown, key=lambda item: -item[1]):
        parts.add_row("", part, gigabytes(size), _bar(size / plan.peak_memory_bytes))
    console.print(parts)
    console.print("\n[dim]why[/dim]")
    for reason in plan.reasons:
        console.print(f"  {escape(reason)}")
    if plan.changes:
        console.print("\n[dim]what would fit[/dim]")
        for change in plan.changes:
            console.print(f"  {escape(change)}")


def _lines(plan: "Plan") -> list[tuple[str, str]]:
    share = plan.needed_bytes / plan.budget_bytes if plan.budget_bytes else 1.0
    lines = [
        ("settings", _settings(plan.settings)),
        (
            "memory",
            f"{gigabytes(plan.needed_bytes)} of "
            f"{gigabytes(plan.budget_bytes)}  {_bar(share)}"
            + (f" {share:.0%}" if plan.budget_bytes else ""),
        ),
        ("trained", f"{plan.num_trainable:,} of {plan.num_total:,} values"),
    ]
    if plan.host_memory_bytes:
        lines.append(("host memory", gigabytes(plan.host_memory_bytes)))
    if plan.step_seconds is not None:
        total = "" if plan.total_seconds is None else f"; {_span(plan.total_seconds)} in all"
        lines.append(("time", f"{plan.step_seconds:.2f} s a step{total}"))
    if plan.cost is not None:
        lines.append(("cost", f"{plan.cost:.2f} USD"))
    lines.append(("disk", gigabytes(plan.disk_bytes)))
    if plan.data is not None:
        lines += _data_lines(plan.data)
    if plan.runner_up is not None:
        other = plan.runner_up
        how = f"{other.method}, {_settings(other.settings)}"
        lines.append(("runner-up", f"{how}: {other.difference}"))
    return lines


def _data_lines(data: Any) -> list[tuple[str, str]]:
    lengths = "  ".join(f"<{edge}: {count:,}" for edge, count in data.num_by_length.items())
    cut = "  ".join(f"{edge}: {share:.1%}" for edge, share in data.share_cut.items())
    return [
        (
            "data",
            f"{counted(data.num_documents, 'document')}, {data.num_tokens:,} tokens in "
            f"{counted(data.num_rows, 'row')} ({data.packing_efficiency:.0%} full); largest pass "
            f"{data.longest_pass_tokens:,} tokens",
        ),
        ("lengths", lengths),
        ("longer than", cut),
    ]


def _bar(share: float) -> str:
    filled = round(min(1.0, max(0.0, share)) * BAR_WIDTH)
    return "█" * filled + "░" * (BAR_WIDTH - filled)


def _settings(settings: dict[str, Any]) -> str:
    size = settings["train.micro_batch_size"]
    rows = counted(size, "row")
    paged = " paged" if settings["optim.paged"] else ""
    return (
        f"{rows} a pass, recompute {settings['train.recompute']}, {settings['optim.name']}{paged}"
    )


def _span(seconds: float) -> str:
    """A time for people.

    >>> _span(3725)
    '1 h 2 min'
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _check_plot(path: Path) -> None:
    """Refuse a picture that could not be written, before anything is planned."""
    from nibble.errors import UnavailableError, UsageError

    if path.suffix.lower() not in PLOT_SUFFIXES:
        listed = ", ".join(PLOT_SUFFIXES)
        raise UsageError(
            f"--plot {path}: expected a name that ends in {listed}", fix="--plot plan.png"
        )
    if not path.parent.is_dir():
        raise UsageError(
            f"--plot {path}: there is no folder {path.parent}", fix="make it, or name another"
        )
    if find_spec("matplotlib") is None:
        raise UnavailableError("--plot needs matplotlib", fix='pip install "nibble[plot]"')


def _draw(plan: "Plan", path: Path) -> None:
    """The phases as bars and the parts of the peak, as a picture."""
    from matplotlib.figure import Figure

    from nibble.errors import DiskError

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    phases, parts = figure.subplots(1, 2)
    names = list(plan.phases)
    phases.barh(names, [plan.phases[name] / 1e9 for name in names], color="#4c78a8")
    phases.axvline(plan.budget_bytes / 1e9, color="#e45756", linestyle="--", label="budget")
    phases.invert_yaxis()
    phases.set_xlabel("GB")
    phases.set_title("peak of each phase")
    phases.legend()
    rows = sorted(plan.parts.items(), key=lambda item: item[1])
    parts.barh([name for name, _ in rows], [size / 1e9 for _, size in rows], color="#72b7b2")
    parts.set_xlabel("GB")
    parts.set_title("what the peak is for")
    figure.suptitle(f"{plan.model} on {plan.device}: {plan.method}")
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise DiskError(f"cannot write {path}: {error}", fix="choose another --plot") from None


def _print_history(as_json: bool) -> None:
    from nibble.train.history import read_history, summary

    records = read_history()
    if as_json:
        typer.echo(progress.to_json({"runs": records, "summary": summary(records)}))
        return
    if not records:
        typer.echo("no finished run on this machine yet")
        return
    for record in records:
        typer.echo(
            f"{record['device']:24} {record['method']:6} {record['model']:32} "
            f"predicted {gigabytes(record['predicted_bytes'])}, measured "
            f"{gigabytes(record['measured_bytes'])} "
            f"({record['measured_bytes'] / record['predicted_bytes'] - 1:+.1%})"
            + ("" if record["is_comparable"] else "  not counted")
        )
    for device, ratio in summary(records).items():
        typer.echo(f"{device}: measured over predicted {ratio:.3f} in the median")
