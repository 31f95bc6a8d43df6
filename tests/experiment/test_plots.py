"""Pictures, and reports without them."""

import io

import pytest

from nibble.experiment import plots
from nibble.experiment.compare import Record


def size_of(content):
    from matplotlib.image import imread

    return imread(io.BytesIO(content)).shape[1::-1]


def test_three_pictures_for_light_and_dark(report_of):
    found = plots.draw(report_of())
    assert [picture.name for picture in found] == ["loss", "memory", "speed"]
    for picture in found:
        assert picture.light != picture.dark
        assert min(*size_of(picture.light), *size_of(picture.dark)) >= 400


def test_words_say_what_a_picture_shows(report_of):
    loss, memory, speed = (picture.alt for picture in plots.draw(report_of()))
    assert "full ends at 1.501 held out" in loss
    assert "qlora 150.0 MiB" in memory
    assert "lora 200.0 MiB at 500 tokens per second" in speed


def test_one_seed_and_one_method_are_drawn(report_of):
    figures = {"lora": (2.0, 200, 20.0), "full": Record(78, "too large")}
    assert len(plots.draw(report_of(figures, num_seeds=1))) == 3


def test_without_a_plan_there_is_no_memory_by_part(report_of):
    from dataclasses import replace

    found = plots.draw(report_of(change=lambda run: replace(run, parts={}, settings={})))
    assert [picture.name for picture in found] == ["loss", "speed"]


def test_nothing_to_draw(report_of, monkeypatch):
    assert plots.draw(report_of({"lora": Record(78, "too large")})) == []
    monkeypatch.setattr(plots, "has_matplotlib", lambda: False)
    assert plots.draw(report_of()) == []


def test_a_line_is_the_mean_of_the_steps_before():
    losses = {step: float(step) for step in range(1, 101)}
    smooth = plots._smooth(losses)
    assert (smooth[1], smooth[2]) == (1.0, 1.5)
    assert smooth[100] == pytest.approx(98.0)
    assert plots._smooth({1: 3.0, 2: 5.0}) == {1: 3.0, 2: 5.0}


def test_equal_values_have_no_spread(report_of):
    from dataclasses import replace

    # The mean of three times this is rounded to below it.
    before = {0: 0.1, 10: 0.7}
    found = plots.draw(report_of(change=lambda run: replace(run, held_out=before)))
    assert len(found) == 3


def test_lines_of_one_course_are_all_seen(report_of):
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    plots._draw_loss(report_of(), axes)
    lines = {line.get_label(): line for line in axes.get_lines()}
    under, over = lines["lora, training"], lines["qlora, training"]
    assert not under.is_dashed()
    assert over.is_dashed()


def test_parts_add_up_and_small_ones_are_one(report_of):
    from dataclasses import replace

    many = {f"part {n}": 100 - n for n in range(12)}
    methods = report_of(change=lambda run: replace(run, parts=many)).finished
    parts = list(plots._parts(methods))
    assert len(parts) == 8
    assert parts[-1][0] == "other"
    assert sum(sizes["lora"] for _, sizes in parts) == pytest.approx(sum(many.values()))
