"""Packing: no token lost or doubled, documents stay apart, always the same."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nibble.data.chat import NOT_TARGET, Example
from nibble.data.packing import cut_text, fit, pack
from nibble.errors import DataError

LIMIT = 24


@st.composite
def example_lists(draw, max_len=60, max_size=20):
    examples = []
    for line in range(1, draw(st.integers(1, max_size)) + 1):
        size = draw(st.integers(1, max_len))
        is_text = draw(st.booleans())
        ids = [line * 1000 + i for i in range(size)]
        start = 0 if is_text else draw(st.integers(0, size))
        labels = [NOT_TARGET] * start + ids[start:]
        examples.append(Example(ids, labels, "f", line, is_text))
    return examples


def documents(row):
    """The (ids, labels, positions) of each document of a row."""
    edges = np.cumsum([0, *row.doc_lens])
    return [
        tuple(v[a:b].tolist() for v in (row.input_ids, row.labels, row.position_ids))
        for a, b in itertools.pairwise(edges)
    ]


@settings(max_examples=150, deadline=None)
@given(example_lists(max_len=LIMIT), st.booleans())
def test_pack_keeps_every_token_once_and_documents_apart(examples, packing):
    rows = pack(examples, max_seq_len=LIMIT, packing=packing)

    found = [document for row in rows for document in documents(row)]
    expected = sorted((e.input_ids, [NOT_TARGET, *e.labels[1:]]) for e in examples)
    assert sorted((ids, labels) for ids, labels, _ in found) == expected
    for row in rows:
        assert len(row) <= LIMIT
        steps = np.diff(row.segment_ids)
        assert row.segment_ids[0] == 0
        assert set(steps.tolist()) <= {0, 1}
        for _, labels, positions in documents(row):
            assert positions == list(range(len(positions)))
            assert labels[0] == NOT_TARGET
        assert row.num_target_tokens == sum(label != NOT_TARGET for label in row.labels)
    if not packing:
        assert [row.input_ids.tolist() for row in rows] == [e.input_ids for e in examples]


@settings(max_examples=50, deadline=None)
@given(example_lists(max_len=LIMIT))
def test_pack_is_deterministic_and_wastes_less_than_half(examples):
    rows = pack(examples, max_seq_len=LIMIT)
    again = pack(examples, max_seq_len=LIMIT)
    assert [r.input_ids.tolist() for r in rows] == [r.input_ids.tolist() for r in again]
    # best fit leaves at most one row half empty
    assert sum(len(row) <= LIMIT / 2 for row in rows) <= 1


@settings(max_examples=100, deadline=None)
@given(example_lists(), st.sampled_from(["truncate", "drop"]))
def test_fit_accounts_for_every_example(examples, on_long_row):
    whole = Example([1, 2], [NOT_TARGET, 2], "f", 99)
    examples = [*examples, whole]
    fitted, counts = fit(examples, LIMIT, on_long_row)
    assert counts.num_examples == len(examples)
    assert all(len(example.input_ids) <= LIMIT for example in fitted)
    chats = [e for e in examples if not e.is_text]
    kept = sum(not e.is_text for e in fitted)
    assert kept + counts.num_dropped_long + counts.num_dropped_without_target == len(chats)
    text_ids = [i for e in examples if e.is_text for i in e.input_ids]
    assert [i for e in fitted if e.is_text for i in e.input_ids] == text_ids
    assert counts.num_tokens == sum(len(e.input_ids) for e in fitted)
    rows = pack(fitted, max_seq_len=LIMIT)
    assert counts.num_target_tokens == sum(row.num_target_tokens for row in rows)


def chat(size, num_targets, line=1):
    ids = list(range(1, size + 1))
    labels = [NOT_TARGET] * (size - num_targets) + ids[size - num_targets :]
    return Example(ids, labels, "a.jsonl", line)


def test_best_fit_takes_the_fullest_row_with_room():
    examples = [chat(n, 1) for n in (10, 9, 7, 6, 5, 3)]
    rows = pack(examples, max_seq_len=16)
    assert [row.doc_lens for row in rows] == [[10, 6], [9, 7], [5, 3]]


def test_truncation_that_takes_all_targets_is_dropped_and_told():
    fitted, counts = fit([chat(30, 3, line=7), chat(8, 2, line=8)], 16, "truncate")
    assert [example.line for example in fitted] == [8]
    assert (counts.num_truncated, counts.num_dropped_without_target) == (1, 1)
    assert counts.places == [
        ("a.jsonl", 7, "cut from 30 tokens to 16"),
        ("a.jsonl", 7, "dropped: no target token"),
    ]
    assert counts.sentences() == [
        "1 of 2 rows cut at data.max_seq_len",
        "1 of 2 rows dropped: no target token within data.max_seq_len",
    ]


def test_stop_names_the_long_row():
    with pytest.raises(DataError, match=r"a.jsonl:3: the row has 30 tokens.*max_seq_len = 16"):
        fit([chat(30, 3, line=3)], 16, "stop")


def test_no_target_left_is_an_error():
    with pytest.raises(DataError, match="no token of the data is a target: 1 of 1 rows cut"):
        fit([chat(30, 3)], 16, "truncate")


def test_a_lone_first_token_is_no_target():
    with pytest.raises(DataError, match="no token of the data is a target"):
        fit([Example([5], [5], "a", 1)], 16)


def test_text_is_cut_and_chat_is_not():
    text = Example(list(range(10)), list(range(10)), "a", 1, is_text=True)
    assert [piece.input_ids for piece in cut_text(text, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert cut_text(chat(10, 2), 4) == [chat(10, 2)]


def test_pack_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="a document of 17 tokens > 16"):
        pack([chat(17, 1)], max_seq_len=16)
