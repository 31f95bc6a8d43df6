"""What a person sees never ends a run."""

from nibble.commands.progress import TrainingBar
from nibble.events import PlanMade, WarningRaised


def test_brackets_in_a_text_are_text(capsys):
    with TrainingBar() as bar:
        bar(WarningRaised('the role is "[/INST]"'))
        bar(PlanMade({}, ["a list of [q_proj]"]))
    shown = capsys.readouterr().err
    assert "[/INST]" in shown
    assert "[q_proj]" in shown


def test_a_terminal_that_is_gone_ends_nothing(monkeypatch):
    def gone(*arguments, **options):
        raise BrokenPipeError

    bar = TrainingBar()
    monkeypatch.setattr(bar._console, "print", gone)
    bar(WarningRaised("x"))
