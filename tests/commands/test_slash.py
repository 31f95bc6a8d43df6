"""Every command of a chat, on a chat that answers nothing."""

import pytest

from nibble.commands.slash import COMMANDS, is_command, run_command
from nibble.errors import UsageError
from nibble.serve.chat import Chat


class _Adapters:
    names = ("law", "maths")


class _Model:
    class config:
        max_position_embeddings = 64


@pytest.fixture
def chat():
    return Chat(_Model, None, _Adapters())


def test_what_is_a_command():
    assert is_command("/help")
    assert not is_command("//help")
    assert not is_command("help / me")


def test_help_names_every_command(chat):
    told = run_command(chat, "/help")
    assert all(f"/{name}" in told for name in (*COMMANDS, "quit"))


def test_quit_ends(chat):
    assert run_command(chat, "/quit") is None
    assert run_command(chat, "/exit") is None


@pytest.mark.parametrize(("line", "close"), [("/hlp", "/help"), ("/quti", "/quit")])
def test_an_unknown_command_names_the_closest(chat, line, close):
    with pytest.raises(UsageError, match=f'did you mean "{close}"'):
        run_command(chat, line)
    with pytest.raises(UsageError, match="/help lists them"):
        run_command(chat, "/zzzzzz")


def test_adapter_lists_and_switches(chat):
    assert run_command(chat, "/adapter").splitlines() == ["  base", "* law", "  maths"]
    run_command(chat, "/adapter maths")
    assert chat.adapter == "maths"
    run_command(chat, "/adapter base")
    assert chat.adapter is None
    assert run_command(chat, "/adapter").startswith("* base")


def test_compare_is_on_and_off(chat):
    run_command(chat, "/compare")
    assert chat.speakers == (None, "law")
    run_command(chat, "/compare")
    assert chat.speakers == ("law",)
    run_command(chat, "/compare on")
    run_command(chat, "/compare on")
    assert chat.is_comparing
    run_command(chat, "/compare off")
    with pytest.raises(UsageError, match="on or off"):
        run_command(chat, "/compare maybe")
    run_command(chat, "/adapter base")
    with pytest.raises(UsageError, match="/adapter law"):
        run_command(chat, "/compare")


def test_system_is_shown_set_and_taken_away(chat):
    assert run_command(chat, "/system") == "no system turn"
    run_command(chat, "/system Be brief.")
    assert chat.system == "Be brief."
    assert run_command(chat, "/system") == "system: Be brief."
    run_command(chat, "/system off")
    assert chat.system == ""


def test_set_shows_and_changes(chat):
    assert "temperature 0.0" in run_command(chat, "/set")
    assert run_command(chat, "/set temperature 0.7") == "temperature 0.7"
    assert run_command(chat, "/set top_p=0.9") == "top_p 0.9"
    assert run_command(chat, "/set seed none") == "seed none"
    with pytest.raises(UsageError, match="expected a value"):
        run_command(chat, "/set seed")


def test_undo_reset_save_and_stats_where_nothing_was_said(chat):
    assert "nothing" in run_command(chat, "/undo")
    assert "new" in run_command(chat, "/reset")
    assert "no answer" in run_command(chat, "/stats")
    with pytest.raises(UsageError, match="expected a file"):
        run_command(chat, "/save")
    with pytest.raises(UsageError, match="nothing to save"):
        run_command(chat, "/save a.jsonl")
