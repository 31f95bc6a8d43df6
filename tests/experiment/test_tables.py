"""What stands in a report."""

from dataclasses import replace

from nibble.experiment.compare import Record
from nibble.experiment.criteria import GROUPS
from nibble.experiment.tables import build_page


def cells(page, title):
    return {row[0]: row[1:] for table in page.groups for row in table.rows if table.title == title}


def test_all_six_criteria_have_rows_for_every_method(report_of):
    page = build_page(report_of())
    assert [table.title for table in page.groups] == ["Runs", *GROUPS]
    for table in (*page.groups, *page.others):
        assert table.rows
        assert {len(row) for row in table.rows} == {len(table.columns)}


def test_figures_are_written_with_their_interval(report_of):
    found = cells(build_page(report_of()), "Performance")
    lora, qlora, full = found["held-out loss after"]
    assert (lora, qlora, full) == ("2.0007 ± 0.0274", "2.0107 ± 0.0274", "1.5007 ± 0.0274")
    found = cells(build_page(report_of()), "Memory")
    assert found["measured, beside lora"] == ("-", "25.0 % less", "200.0 % more")


def test_six_rows_hold_the_most_important_figures(report_of):
    table = build_page(report_of()).summary
    assert table.columns == ("", "lora", "qlora", "full")
    assert [row[0] for row in table.rows] == list(GROUPS)
    assert [row[2] for row in table.rows] == [
        "base 30.0 MiB, saved 3.0 MiB (10.0 % of it)",
        "25 s; a step 2.500 s; 400 tokens/s",
        "150.0 MiB, 75.0 % less than full",
        "held-out loss 2.0107 ± 0.0274; tokens right 60.0 %; short answers right 25.0 %; "
        "forgot 0.2000 nats",
        "the settings of all; 0 warnings",
        "RTX 4060, needs 200.0 MiB",
    ]


def test_a_method_without_a_run_says_how_it_ended_in_six_rows(report_of):
    figures = {"lora": (2.0, 200, 20.0), "full": Record(78, "nothing fits")}
    page = build_page(report_of(figures, devices=False))
    assert {row[2] for row in page.summary.rows} == {"does not fit"}
    assert page.summary.rows[2][1] == "200.0 MiB"
    assert page.summary.rows[-1][1] == "-"


def test_a_machine_that_was_not_always_as_fast_is_told(report_of):
    def slowed(run):
        rate = run.values["tokens_per_s"] / (2 if run.seed == 1 else 1)
        return replace(run, values={**run.values, "tokens_per_s": rate})

    told = [note for note in build_page(report_of(change=slowed)).notes if "in speed" in note]
    assert len(told) == 1
    assert "up to 2.0 times" in told[0]
    assert not [note for note in build_page(report_of()).notes if "in speed" in note]


def test_hardware_names_the_smallest_device(report_of):
    found = cells(build_page(report_of()), "Hardware")
    assert set(found["smallest device that fits"]) == {"RTX 4060, needs 200.0 MiB"}


def test_methods_without_a_figure_have_a_dash_and_a_note(report_of):
    figures = {
        "lora": (2.0, 200, 20.0),
        "full": Record(78, "nothing fits: 90 GB.", "a smaller base"),
    }
    page = build_page(report_of(figures))
    assert cells(page, "Runs")["outcome"] == ("finished", "does not fit")
    assert cells(page, "Performance")["held-out loss after"][1] == "-"
    assert "full: nothing fits: 90 GB. (what would fit: a smaller base)" in page.notes
    assert "full does not fit here." in page.answer


def test_warnings_are_told_with_the_number_of_runs(report_of):
    def warned(run):
        return replace(run, warnings=("row 3 was cut",) if run.seed < 2 else ())

    page = build_page(report_of({"lora": (2.0, 200, 20.0)}, change=warned))
    assert "Warning in some runs (2 of 3 of lora): row 3 was cut" in page.notes
    assert cells(page, "Setting up")["warnings"] == ("1",)


def test_differences_say_whether_they_are_told(report_of):
    table = next(t for t in build_page(report_of()).others if t.title.startswith("Differences"))
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["held-out loss after: qlora - lora"] == (
        "+0.0100", "+0.0100 to +0.0100", "+0.50 %", "yes",
    )  # fmt: skip
    assert rows["token accuracy after: full - qlora"] == (
        "+0.0 points", "+0.0 to +0.0 points", "+0.00 %", "no",
    )  # fmt: skip
    one = build_page(report_of(num_seeds=1)).others[0].rows[0]
    assert one[2:] == ("one seed", "+0.50 %", "one seed")


def test_without_a_plan_there_is_no_table_of_devices(report_of):
    page = build_page(report_of(devices=False))
    assert [table.title for table in page.others] == ["Differences, seed by seed"]
    assert "Hardware" not in [table.title for table in page.groups]
