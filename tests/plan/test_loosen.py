"""Changes that would make a run fit: of each kind the smallest, at most two."""

import pytest

import nibble
from nibble.plan.loosen import changes_that_fit


def changes(*overrides, fits, is_base_too_large=False):
    run = nibble.load_config(None, ["model.name=x", "data.max_seq_len=2048", *overrides])
    return changes_that_fit(run, fits, is_base_too_large=is_base_too_large)


@pytest.mark.parametrize("longest", [64, 100, 128, 1000, 1024, 2047])
def test_the_longest_rows_that_fit(longest):
    found = changes(fits=lambda run: run.data.max_seq_len <= longest)[0]
    length = int(found.removeprefix("data.max_seq_len="))
    assert length <= longest < 2 * length


def test_the_highest_rank_that_fits():
    assert changes(fits=lambda run: run.lora.rank <= 5) == ["lora.rank=4"]


def test_where_neither_is_enough_the_lowest_rank_goes_with_shorter_rows():
    found = changes(fits=lambda run: run.lora.rank == 1 and run.data.max_seq_len <= 300)
    assert found == ["lora.rank=1, data.max_seq_len=256"]


def test_no_change_holds_another_one():
    found = changes(fits=lambda run: run.lora.rank < 16 or run.data.max_seq_len < 2048)
    assert found == ["lora.rank=8", "data.max_seq_len=1024"]


def test_settings_of_the_user_come_first():
    found = changes(
        "train.micro_batch_size=8",
        "train.recompute=none",
        fits=lambda r: r.train.recompute == "auto",
    )
    assert found == ["train.recompute=auto"]


def test_settings_that_need_the_least_already_stay():
    tried = []
    changes("train.micro_batch_size=1", "optim.paged=true", fits=lambda run: tried.append(run))
    assert all(run.train.micro_batch_size == 1 and run.optim.paged is True for run in tried)


def test_four_bits_are_proposed_where_they_were_not_asked_for():
    assert changes("method=lora", fits=lambda run: run.method == "qlora") == ["method=qlora"]
    assert changes("method=qlora", fits=lambda run: False) == []


def test_four_bits_with_what_else_was_set():
    found = changes(
        "method=full", "train.micro_batch_size=64", is_base_too_large=True,
        fits=lambda run: run.method == "qlora" and run.train.micro_batch_size == "auto",
    )  # fmt: skip
    assert found == ["method=qlora, train.micro_batch_size=auto"]


def test_where_the_base_alone_is_too_large_rows_do_not_help():
    assert changes("method=qlora", is_base_too_large=True, fits=lambda run: True) == []


def test_few_questions_are_asked():
    tried = []
    changes("train.micro_batch_size=8", "method=lora", fits=lambda run: tried.append(run))
    assert len(tried) <= 14
