"""A page as lines of a terminal and as Markdown."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from nibble.experiment.tables import Page, Table

if TYPE_CHECKING:
    from rich.console import Console

# Characters of a column; longer cells take several lines.
_WIDEST = 40


def print_page(page: Page, console: "Console") -> None:
    """Tables, the answer, notes; without frames where it is no terminal."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table as RichTable

    frame = box.SIMPLE_HEAD if console.is_terminal else None

    def shown(columns: Sequence[str], tables: Sequence[Table]) -> RichTable:
        table = RichTable(box=frame, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
        for number, column in enumerate(columns):
            justify = "left" if number == 0 else "right"
            table.add_column(escape(column), justify=justify, max_width=_WIDEST)
        for part in tables:
            if len(tables) > 1:
                table.add_row(f"[bold]{escape(part.title)}[/bold]")
            for row in part.rows:
                table.add_row(*map(escape, row))
            if part is not tables[-1]:
                table.add_section() if frame else table.add_row()
        return table

    console.print(f"[bold]{escape(page.title)}[/bold]")
    for name, value in page.facts:
        console.print(f"  [dim]{name:14}[/dim] {escape(value)}", soft_wrap=True)
    console.print()
    console.print(shown(page.groups[0].columns, page.groups))
    for other in page.others:
        console.print(f"\n[bold]{escape(other.title)}[/bold]  {escape(other.about)}")
        console.print(shown(other.columns, [other]))
    console.print(f"\n[bold]{escape(page.summary.title)}[/bold]")
    console.print(shown(page.summary.columns, [page.summary]))
    console.print("\n[bold]Which to use[/bold]")
    console.print(escape(" ".join(page.answer)))
    console.print("\n[bold]Notes[/bold]")
    for note in page.notes:
        console.print(f"- {escape(note)}")


def to_markdown(page: Page, pictures: Sequence[tuple[str, str]]) -> str:
    """The page as Markdown; `pictures` are file names and what they show."""
    lines = [f"# {page.title}", ""]
    lines += [f"- {name}: {_cell(value)}" for name, value in page.facts]
    lines += ["", "## Which to use", "", " ".join(page.answer), ""]
    for table in (page.summary, *page.groups):
        lines += [f"## {table.title}", "", *_markdown_table(table), ""]
    for table in page.others:
        lines += [f"## {table.title}", "", table.about, "", *_markdown_table(table), ""]
    if pictures:
        lines += ["## Pictures", ""]
        lines += [f"![{_cell(alt)}]({name})\n" for name, alt in pictures]
    lines += ["## Notes", "", *(f"- {_cell(note)}" for note in page.notes)]
    return "\n".join(lines) + "\n"


def _markdown_table(table: Table) -> Iterator[str]:
    yield "| " + " | ".join(map(_cell, table.columns)) + " |"
    yield "|---|" + "---:|" * (len(table.columns) - 1)
    for row in table.rows:
        yield "| " + " | ".join(map(_cell, row)) + " |"


def _cell(text: str) -> str:
    """Text that is neither markup nor the end of a cell."""
    escaped = text.replace("\\", "\\\\").replace("|", r"\|")
    for mark in ("*", "_", "`", "<", "["):
        escaped = escaped.replace(mark, f"\\{mark}")
    return " ".join(escaped.split())
