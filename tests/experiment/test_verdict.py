"""Which method is named, and why."""

import pytest

from nibble.experiment.compare import Record
from nibble.experiment.verdict import beside_lora, verdict


def text(report):
    return " ".join(verdict(report))


@pytest.mark.parametrize(
    ("figures", "chosen"),
    [
        # the lowest loss, although it takes more of everything
        ({"lora": (2.0, 200, 20.0), "full": (1.5, 600, 40.0)}, "full"),
        # as good, so the fastest
        ({"lora": (2.0, 200, 20.0), "qlora": (1.99, 150, 25.0)}, "lora"),
        # as good and as fast, so the smaller
        ({"lora": (2.0, 200, 20.0), "qlora": (2.01, 150, 20.5)}, "qlora"),
        # the only one
        ({"qlora": (2.0, 200, 20.0), "full": Record(78, "too large")}, "qlora"),
    ],
)
def test_the_cheapest_of_those_that_are_as_good(report_of, figures, chosen):
    assert verdict(report_of(figures))[0] == f"Use {chosen} here."


@pytest.mark.parametrize(
    ("seconds", "why"),
    [(25.0, "the quickest."), (20.5, "as quick as any and takes the least memory.")],
)
def test_it_says_why_this_one_of_those_that_are_as_good(report_of, seconds, why):
    figures = {"lora": (2.01, 200, 20.0), "qlora": (2.0, 150, 25.0)}
    if seconds < 25:
        figures = {"lora": (2.0, 200, 20.0), "qlora": (2.01, 150, seconds)}
    assert f"of those that are as good it is {why}" in text(report_of(figures))


def test_it_says_what_the_others_cost(report_of):
    said = text(report_of())
    assert "full's held-out loss of 1.5007 is the lowest." in said
    assert (
        "lora has a loss 33.3 % higher, and takes 0.50 times the time and 66.7 % less memory"
        in said
    )
    assert "Where full's 600.0 MiB are too much, the answer is qlora with 150.0 MiB." in said
    assert "one learning rate" in said


def test_seeds_that_do_not_tell_are_no_difference(report_of):
    from dataclasses import replace

    def noisy(run):
        if run.method == "lora":
            return run
        loss = {0: 1.0, 1: 2.2, 2: 2.4}[run.seed]
        return replace(run, values={**run.values, "eval_loss": loss})

    figures = {"lora": (2.0, 200, 20.0), "full": (1.8, 600, 40.0)}
    said = text(report_of(figures, change=noisy))
    assert said.startswith("Use lora here.")
    assert "which the seeds do not tell apart" in said
    assert "More seeds may tell full from lora." in said


def test_what_was_forgotten_is_told_where_it_differs(report_of):
    from dataclasses import replace

    def forgetful(run):
        more = 1.6 if run.method == "lora" else 0.2
        return replace(run, values={**run.values, "forgetting": more + 0.01 * run.seed})

    figures = {"lora": (2.0, 200, 20.0), "full": (2.0, 600, 40.0)}
    said = text(report_of(figures, change=forgetful))
    assert "full forgot less: +0.21 nats on general text against +1.61." in said
    assert "forgot" not in text(report_of(figures))


def test_one_seed_is_said_to_be_one(report_of):
    said = text(report_of(num_seeds=1))
    assert "One seed cannot tell a difference from chance" in said
    assert "seeds do not tell" not in said


def test_nothing_finished(report_of):
    said = verdict(report_of({"lora": Record(78, "too large")}))
    assert said == ["No run is finished, so nothing can be said of the methods."]


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (2.01, ("0.50 % above lora's, within 1 %", "+0.0100 nats", "told apart from 0")),
        (2.10, ("5.00 % above lora's, more than 1 %", "95 % interval +0.1000 to +0.1000")),
        (1.90, ("5.00 % below lora's, more than 1 %",)),
    ],
)
def test_qlora_beside_lora_is_told_with_its_interval(report_of, loss, words):
    said = beside_lora(report_of({"lora": (2.0, 200, 20.0), "qlora": (loss, 150, 25.0)}))
    assert all(word in said for word in words), said


def test_without_lora_there_is_nothing_beside_it(report_of):
    assert beside_lora(report_of({"qlora": (2.0, 150, 25.0)})) == ""
