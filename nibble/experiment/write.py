"""The files of a report in the folder of its comparison.

report.json    for programs
report.md      and its PNGs beside it
report.html    everything in one file
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from nibble.disk import disk_errors, replace_file
from nibble.experiment.page import to_html
from nibble.experiment.plots import draw, has_matplotlib
from nibble.experiment.render import to_markdown
from nibble.experiment.report import Report, to_json
from nibble.experiment.tables import Page, build_page


def to_values(report: Report, page: Page) -> dict[str, Any]:
    """What report.json holds: the figures, and the sentences that a person reads."""
    _, *methods = page.summary.columns
    return {
        **to_json(report),
        "facts": dict(page.facts),
        "answer": " ".join(page.answer),
        "summary": {
            name: dict(zip(methods, cells, strict=True)) for name, *cells in page.summary.rows
        },
        "notes": list(page.notes),
    }


def write_report(report: Report, place: Path) -> Page:
    """Write all files of a report anew, and give it as a person reads it.

    Raises:
        DiskError: If one cannot be written.
    """
    page, pictures = build_page(report), draw(report)
    if not has_matplotlib():
        note = 'No pictures: they need matplotlib, pip install "nibble[plot]".'
        page = replace(page, notes=(*page.notes, note))
    listed = [(f"{picture.name}.png", picture.alt) for picture in pictures]
    texts = {
        "report.json": json.dumps(to_values(report, page), indent=2, ensure_ascii=False) + "\n",
        "report.md": to_markdown(page, listed),
        "report.html": to_html(page, pictures),
    }
    with disk_errors(f"{place}: the report cannot be written"):
        for picture in pictures:
            replace_file(place / f"{picture.name}.png", picture.light)
        for name, text in texts.items():
            replace_file(place / name, text.encode())
    return page
