"""Reading lines and showing answers, without a terminal."""

import io
import sys

import pytest
from rich.console import Console

from nibble.commands import terminal
from nibble.commands.terminal import (
    history_path,
    line_history,
    markdown,
    printable,
    read_question,
    show_answers,
    split_blocks,
)
from nibble.serve.chat import Part


def shown(parts, names, *, width=80, is_terminal=False):
    file = io.StringIO()
    console = Console(
        file=file, width=width, force_terminal=is_terminal, highlight=False, color_system=None
    )
    show_answers(iter(parts), names, console)
    return file.getvalue()


BOTH = [Part(0, "a", False), Part(1, "x\n", False), Part(1, "y", True), Part(0, "b", True)]


def test_plain_text_is_what_was_said_and_nothing_else():
    parts = [Part(0, "**one**\n", False), Part(0, "\x1b[31mtwo <b>", True)]
    assert shown(parts, ["law"]) == "**one**\n[31mtwo <b>\n"


def test_answers_that_come_together_are_shown_one_after_the_other():
    assert shown(BOTH, ["base", "law"]) == "base: ab\nlaw: x\ny\n"


def test_on_a_terminal_markdown_is_drawn():
    parts = [Part(0, "one **two**\n\n", False), Part(0, "- item\n", True)]
    text = shown(parts, ["law"], is_terminal=True)
    assert "**" not in text
    assert "• item" in text
    assert "law" not in text


def test_two_columns_where_they_fit():
    wide = shown(BOTH, ["base", "law"], width=120, is_terminal=True).splitlines()
    assert any("base" in line and "law" in line for line in wide)
    assert any("ab" in line and "x" in line for line in wide)
    narrow = shown(BOTH, ["base", "law"], width=60, is_terminal=True).splitlines()
    assert not any("base" in line and "law" in line for line in narrow)


def test_what_was_shown_stays_where_an_answer_is_stopped():
    def parts():
        yield Part(0, "one", False)
        raise KeyboardInterrupt

    file = io.StringIO()
    with pytest.raises(KeyboardInterrupt):
        show_answers(parts(), ["law"], Console(file=file))
    assert file.getvalue() == "one\n"


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("", ""),
        ("one", ""),
        ("one\n\ntwo", "one\n\n"),
        ("one\n\n```\na\n\nb", "one\n\n"),
        ("```\na\n\nb\n```\n\nc", "```\na\n\nb\n```\n\n"),
        ("one\n   \ntwo\n\n", "one\n   \ntwo\n\n"),
    ],
)
def test_blocks_are_cut_at_empty_lines_outside_of_fences(text, whole):
    assert split_blocks(text) == (whole, text[len(whole) :])


def test_line_ends_stay_and_html_is_text():
    console = Console(file=io.StringIO(), width=60, color_system=None)
    console.print(markdown("category: A\nintent: b <think>c</think>\n[x](http://a.b)"))
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
    assert lines[:2] == ["category: A", "intent: b <think>c</think>"]
    assert "http://a.b" in lines[2]


def test_printable_keeps_line_ends_and_tabs():
    assert printable("a\tb\nc\x07\x1b]0;t\x9b\x7fé") == "a\tb\nc]0;té"


@pytest.mark.parametrize(
    ("typed", "questions"),
    [
        ("one\ntwo\n", ["one", "two"]),
        ("one \\\ntwo\nthree", ["one \ntwo", "three"]),
        ("end\\", ["end"]),
        ("\r\n  x  \r\n", ["", "x"]),
    ],
)
def test_lines_that_end_in_a_backslash_go_on(monkeypatch, typed, questions):
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    assert [read_question() for _ in questions] == questions
    with pytest.raises(EOFError):
        read_question()


def test_where_lines_are_kept(monkeypatch, tmp_path):
    monkeypatch.delenv("NIBBLE_HISTORY", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert history_path() == tmp_path / "nibble" / "chat_history"
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert history_path() == tmp_path / ".local/state/nibble/chat_history"
    monkeypatch.setenv("NIBBLE_HISTORY", "off")
    assert history_path() is None


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def test_lines_are_kept_and_a_place_that_cannot_be_written_is_no_error(monkeypatch, tmp_path):
    monkeypatch.delenv("NIBBLE_HISTORY", raising=False)
    monkeypatch.setattr(sys, "stdin", _Terminal())
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    for line in ("what is it?", "\udcff"):
        with line_history() as typed:
            typed.append(line)
    path = tmp_path / "nibble" / "chat_history"
    assert path.read_text().splitlines() == ["what is it?", "?"]
    assert path.stat().st_mode & 0o777 == 0o600
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(blocked))
    with line_history() as typed:
        typed.append("again")
    assert blocked.read_text() == ""


def test_the_oldest_lines_go(monkeypatch, tmp_path):
    monkeypatch.setattr(terminal, "HISTORY_LINES", 2)
    path = tmp_path / "chat_history"
    for line in ("a", "b", "c", "d", "e"):
        terminal._keep_lines(path, [line])
    assert path.read_text() == "d\ne\n"


def test_without_history_nothing_is_written(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdin", _Terminal())
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("NIBBLE_HISTORY", "off")
    with line_history() as typed:
        typed.append("what is it?")
    assert list(tmp_path.iterdir()) == []


def test_what_a_command_did_is_told_without_markup():
    file = io.StringIO()
    terminal.teller(Console(file=file))("[bold]x[/bold] \x1b[1m")
    assert file.getvalue() == "[bold]x[/bold] [1m\n"
