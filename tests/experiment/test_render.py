"""The page on a terminal and as Markdown."""

import io
from dataclasses import replace

from rich.console import Console

from nibble.experiment.render import print_page, to_markdown
from nibble.experiment.tables import build_page


def printed(page, **options):
    file = io.StringIO()
    print_page(page, Console(file=file, width=140, **options))
    return file.getvalue()


def test_where_it_is_no_terminal_there_are_no_frames_and_no_colours(report_of):
    text = printed(build_page(report_of()))
    assert "\x1b" not in text
    assert not set(text) & set("─━│┃")
    assert "held-out loss after" in text
    assert "In six rows" in text
    assert "Use full here." in text


def test_a_terminal_has_them(report_of):
    text = printed(build_page(report_of()), force_terminal=True, color_system="standard")
    assert "\x1b[1m" in text
    assert "─" in text or "━" in text


def test_brackets_are_text(report_of):
    page = replace(build_page(report_of()), notes=("the role is [/INST]",), title="a [bold] one")
    text = printed(page)
    assert "[/INST]" in text
    assert "a [bold] one" in text


def test_markdown_has_every_row_and_picture(report_of):
    page = build_page(report_of())
    text = to_markdown(page, [("loss.png", "Loss over steps.")])
    shown = (page.summary, *page.groups, *page.others)
    for table in shown:
        assert f"## {table.title}" in text
    lines = text.splitlines()
    tables = [at for at, line in enumerate(lines) if line.startswith("|---")]
    assert len(tables) == len(shown)
    for at in tables:
        assert lines[at - 1].count("|") == lines[at].count("|") == lines[at + 1].count("|")
    assert "![Loss over steps.](loss.png)" in text


def test_marks_in_a_cell_are_text(report_of):
    page = replace(build_page(report_of()), notes=("a|b <script> `x` *y* [z](http://a)",))
    text = to_markdown(page, [])
    assert r"a\|b \<script> \`x\` \*y\* \[z](http://a)" in text
