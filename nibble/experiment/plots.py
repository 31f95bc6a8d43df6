"""The pictures of a report: loss over steps, memory by part, speed against memory."""

import io
from collections.abc import Iterator
from importlib.util import find_spec
from statistics import fmean
from typing import Any

from nibble.experiment.criteria import plain
from nibble.experiment.page import Picture
from nibble.experiment.report import Method, Report

# Told apart without colours too: see the markers. Source: Okabe and Ito 2008.
_COLOURS = {"lora": "#0072b2", "qlora": "#d55e00", "full": "#009e73"}
# What is drawn over another line leaves gaps: the two often have one course.
_LINES = {"lora": "-", "qlora": (0, (4, 3)), "full": "-"}
_MARKERS = {"lora": "o", "qlora": "s", "full": "^"}
_PARTS = ("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#0072b2", "#d55e00", "#f0e442")
_INK = {False: "#1d2329", True: "#e6edf3"}
_PAPER = {False: "#ffffff", True: "#0f141a"}
_GRID = {False: "#d0d7de", True: "#30363d"}
_OTHER = "#999999"
# Losses of single steps jump: each point is the mean over so large a part of the run.
_SMOOTH_SHARE = 0.05


def has_matplotlib() -> bool:
    """Whether pictures can be drawn."""
    return find_spec("matplotlib") is not None


def draw(report: Report) -> list[Picture]:
    """All pictures; none where there is no matplotlib or no finished run."""
    if not has_matplotlib() or not report.finished:
        return []
    found = [
        _picture("loss", "Loss", _loss_alt(report), _draw_loss, report),
        _picture("speed", "Speed against memory", _speed_alt(report), _draw_speed, report),
    ]
    if any(run.parts for method in report.finished for run in method.runs):
        memory = _picture("memory", "Memory by part", _memory_alt(report), _draw_memory, report)
        found.insert(1, memory)
    return found


def _picture(name: str, title: str, alt: str, how: Any, report: Report) -> Picture:
    light, dark = (_png(how, report, is_dark) for is_dark in (False, True))
    return Picture(name, title, alt, light, dark)


def _png(how: Any, report: Report, is_dark: bool) -> bytes:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    ink = _INK[is_dark]
    style: dict[Any, Any] = {
        "figure.facecolor": _PAPER[is_dark],
        "axes.facecolor": _PAPER[is_dark],
        "savefig.facecolor": _PAPER[is_dark],
        "legend.facecolor": _PAPER[is_dark],
        "legend.edgecolor": _GRID[is_dark],
        "axes.edgecolor": _GRID[is_dark],
        "grid.color": _GRID[is_dark],
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), ink),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "font.size": 11,
    }
    with rc_context(style), io.BytesIO() as file:
        figure = Figure(figsize=(6, 4.4), layout="constrained")
        how(report, figure.subplots())
        figure.savefig(file, format="png", dpi=150)
        return file.getvalue()


def _draw_loss(report: Report, axes: Any) -> None:
    """A line for the mean over seeds of the training loss, a band for their range, the held-out."""
    for method in report.finished:
        colour = _COLOURS[method.name]
        curves = [_smooth(run.losses) for run in method.runs]
        steps = sorted(set.intersection(*(set(curve) for curve in curves)))
        columns = [[curve[step] for curve in curves] for step in steps]
        style, label = _LINES[method.name], f"{method.name}, training"
        axes.plot(steps, list(map(fmean, columns)), color=colour, linestyle=style, label=label)
        axes.fill_between(
            steps, list(map(min, columns)), list(map(max, columns)), color=colour, alpha=0.25, lw=0
        )
        held_out = sorted({step for run in method.runs for step in run.held_out})
        rows = [[r.held_out[step] for r in method.runs if step in r.held_out] for step in held_out]
        means = list(map(fmean, rows))
        # The mean of equal values may be rounded to outside of them.
        spread = [[max(0.0, m - min(row)) for m, row in zip(means, rows, strict=True)]]
        spread += [[max(0.0, max(row) - m) for m, row in zip(means, rows, strict=True)]]
        axes.errorbar(
            held_out,
            means,
            yerr=spread,
            color=colour,
            marker=_MARKERS[method.name],
            linestyle="dotted" if len(held_out) > 2 else "none",
            markerfacecolor="none",
            capsize=3,
            label=f"{method.name}, held out",
        )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss in nats per token")
    _legend_below(axes, len(report.finished))


def _smooth(losses: dict[int, float]) -> dict[int, float]:
    """Each step's mean with those before it."""
    steps = sorted(losses)
    width = max(1, round(_SMOOTH_SHARE * len(steps)))
    return {
        step: fmean(losses[s] for s in steps[max(0, at - width + 1) : at + 1])
        for at, step in enumerate(steps)
    }


def _draw_memory(report: Report, axes: Any) -> None:
    """The predicted peak by what it is for, and the measured one as a mark."""
    unit, name = _unit(max(m.figures["peak_memory_bytes"].value for m in report.finished))
    methods = [method for method in report.finished if any(run.parts for run in method.runs)]
    names = [method.name for method in methods]
    bottoms = dict.fromkeys(names, 0.0)
    for number, (part, sizes) in enumerate(_parts(methods)):
        heights = [sizes[n] / unit for n in names]
        axes.bar(
            names,
            heights,
            bottom=[bottoms[n] for n in names],
            width=0.55,
            color=_PARTS[number] if number < len(_PARTS) else _OTHER,
            label=part,
        )
        bottoms = {n: bottoms[n] + h for n, h in zip(names, heights, strict=True)}
    for at, method in enumerate(methods):
        peak = method.figures["peak_memory_bytes"].value / unit
        axes.hlines(peak, at - 0.36, at + 0.36, color=axes.xaxis.label.get_color(), lw=2.5)
    axes.plot([], [], color=axes.xaxis.label.get_color(), lw=2.5, label="measured peak")
    axes.set_ylabel(f"predicted peak in {name}")
    axes.grid(visible=False, axis="x")
    _legend_below(axes, 3)


def _parts(methods: list[Method]) -> Iterator[tuple[str, dict[str, float]]]:
    """Parts with their mean bytes by method, the largest first, small ones together."""
    means: dict[str, dict[str, float]] = {}
    for method in methods:
        runs = [run.parts for run in method.runs if run.parts]
        for part in {name for parts in runs for name in parts}:
            mean = fmean(parts.get(part, 0) for parts in runs)
            means.setdefault(part, {})[method.name] = max(0.0, mean)
    names = [method.name for method in methods]
    ordered = sorted(means.items(), key=lambda item: -max(item[1].values()))
    for part, sizes in ordered[: len(_PARTS)]:
        yield part, {n: sizes.get(n, 0.0) for n in names}
    rest = [sizes for _, sizes in ordered[len(_PARTS) :]]
    if rest:
        yield "other", {n: sum(sizes.get(n, 0.0) for sizes in rest) for n in names}


def _draw_speed(report: Report, axes: Any) -> None:
    """A mark for each run: its measured peak and its tokens per second."""
    unit, name = _unit(max(m.figures["peak_memory_bytes"].value for m in report.finished))
    for method in report.finished:
        axes.scatter(
            [run.values["peak_memory_bytes"] / unit for run in method.runs],
            [run.values["tokens_per_s"] for run in method.runs],
            color=_COLOURS[method.name],
            marker=_MARKERS[method.name],
            s=70,
            label=method.name,
        )
    axes.margins(0.15)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"measured peak memory in {name}")
    axes.set_ylabel("tokens per second")
    _legend_below(axes, len(report.finished))


def _legend_below(axes: Any, num_columns: int) -> None:
    axes.figure.legend(
        *axes.get_legend_handles_labels(), ncols=num_columns, fontsize=9, loc="outside lower center"
    )


def _unit(num_bytes: float) -> tuple[float, str]:
    return (2**30, "GiB") if num_bytes >= 2**30 else (2**20, "MiB")


def _loss_alt(report: Report) -> str:
    ends = [
        f"{m.name} ends at {m.figures['eval_loss'].value:.3f} held out"
        for m in report.finished
        if "eval_loss" in m.figures
    ]
    return (
        "Loss over steps: lines are means over seeds of the training loss, bands their range, "
        f"marks the held-out loss. {'; '.join(ends)}."
    )


def _memory_alt(report: Report) -> str:
    peaks = [_peak(method) for method in report.finished]
    return (
        "Bars: the predicted peak by what it is for; black or white lines: the measured peak. "
        f"Measured: {'; '.join(peaks)}."
    )


def _speed_alt(report: Report) -> str:
    found = [
        f"{_peak(m)} at {plain(m.figures['tokens_per_s'].value, 'rate')} tokens per second"
        for m in report.finished
    ]
    return f"One mark a run, the better the higher and the further left. {'; '.join(found)}."


def _peak(method: Method) -> str:
    return f"{method.name} {plain(method.figures['peak_memory_bytes'].value, 'bytes')}"
