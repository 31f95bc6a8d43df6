"""A page as one HTML file: no script, nothing from outside, light or dark as the reader's screen.

Wide tables scroll inside their own box, so that the page never does.
"""

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from nibble.experiment.tables import Page, Table

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2329; --paper: #ffffff; --dim: #57606a;
  --line: #d0d7de; --shade: #f6f8fa; --accent: #0a5c9e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --paper: #0f141a; --dim: #9aa5b1;
  --line: #30363d; --shade: #171d24; --accent: #7cc0ff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 1rem 0; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p.answer { max-width: 46rem; padding: .75rem 1rem; border-left: .25rem solid var(--accent);
  background: var(--shade); }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: .25rem 1rem;
  margin: 0; font-size: .9rem; }
dt { color: var(--dim); }
dd { margin: 0; overflow-wrap: anywhere; min-width: 0; }
.box { overflow-x: auto; border: 1px solid var(--line); border-radius: .4rem; }
.box:focus-visible { outline: 2px solid var(--accent); }
table { border-collapse: collapse; width: 100%; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .5rem .75rem; color: var(--dim); }
th, td { padding: .35rem .75rem; text-align: right; vertical-align: top;
  border-top: 1px solid var(--line); }
th:first-child { text-align: left; font-weight: 500; }
th[scope=row] { position: sticky; left: 0; background: var(--paper); min-width: 6.5rem; }
thead th { background: var(--shade); border-top: 0; }
tbody th[scope=rowgroup] { padding-top: .9rem; font-weight: 700; background: var(--shade); }
td { min-width: 6.5rem; max-width: 16rem; }
figure { margin: 1rem 0; }
figure img { max-width: 100%; height: auto; display: block; border-radius: .4rem; }
figcaption { color: var(--dim); font-size: .9rem; padding-top: .25rem; }
li { overflow-wrap: anywhere; margin: .25rem 0; }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; }
  th, td { padding: .3rem .5rem; } }
"""
# Even a hole in the escaping could load nothing and run nothing.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


@dataclass(frozen=True)
class Picture:
    """A PNG for light and one for dark screens, its heading, and what it shows in words."""

    name: str
    title: str
    alt: str
    light: bytes
    dark: bytes


def to_html(page: Page, pictures: Sequence[Picture]) -> str:
    """The whole page, in one file."""
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="generator" content="nibble compare">',
            f"<title>{escape(page.title)}</title>",
            f"<style>{_STYLE}</style>",
            "</head>",
            "<body>",
            "<main>",
            *_body(page, pictures),
            "</main>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _body(page: Page, pictures: Sequence[Picture]) -> Iterator[str]:
    yield f"<h1>{escape(page.title)}</h1>"
    yield "<dl>"
    for name, value in page.facts:
        yield f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>"
    yield "</dl>"
    yield "<h2>Which to use</h2>"
    yield f'<p class="answer">{escape(" ".join(page.answer))}</p>'
    yield f"<h2>{escape(page.summary.title)}</h2>"
    yield from _table("The most important figures", page.summary.columns, [page.summary])
    yield "<h2>Six criteria</h2>"
    yield from _table("Figures by method", page.groups[0].columns, page.groups)
    for other in page.others:
        yield f"<h2>{escape(other.title)}</h2>"
        yield from _table(other.about, other.columns, [other])
    for picture in pictures:
        yield f"<h2>{escape(picture.title)}</h2>"
        yield from _figure(picture)
    yield "<h2>Notes</h2>"
    yield "<ul>"
    yield from (f"<li>{escape(note)}</li>" for note in page.notes)
    yield "</ul>"


def _table(caption: str, columns: Sequence[str], parts: Sequence[Table]) -> Iterator[str]:
    """A table in a box of its own, which keyboards reach as well."""
    label = escape(caption, quote=True)
    yield f'<div class="box" tabindex="0" role="region" aria-label="{label}">'
    yield f"<table><caption>{escape(caption)}</caption>"
    heads = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    yield f"<thead><tr>{heads}</tr></thead>"
    for part in parts:
        yield "<tbody>"
        if len(parts) > 1:
            title = escape(part.title)
            yield f'<tr><th scope="rowgroup" colspan="{len(columns)}">{title}</th></tr>'
        for first, *cells in part.rows:
            values = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
            yield f'<tr><th scope="row">{escape(first)}</th>{values}</tr>'
        yield "</tbody>"
    yield "</table></div>"


def _figure(picture: Picture) -> Iterator[str]:
    dark, light = (_data_uri(content) for content in (picture.dark, picture.light))
    yield "<figure><picture>"
    yield f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
    yield f'<img src="{light}" alt="{escape(picture.alt, quote=True)}">'
    yield "</picture>"
    yield f"<figcaption>{escape(picture.alt)}</figcaption></figure>"


def _data_uri(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()
