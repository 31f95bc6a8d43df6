"""The demo's letters: held out means unseen."""

import json
import re

from nibble.demo.data import INTENTS, NUM_HELD_OUT, NUM_TRAIN, make_examples, write_dataset


def _texts(rows, turn):
    return [row["messages"][turn]["content"] for row in rows]


def test_sizes_and_repeatability():
    train, held_out = make_examples()
    assert (len(train), len(held_out)) == (NUM_TRAIN, NUM_HELD_OUT)
    assert make_examples() == (train, held_out)
    assert make_examples(seed=1) != (train, held_out)


def test_held_out_is_unseen():
    train, held_out = make_examples()
    assert not set(_texts(train, 0)) & set(_texts(held_out, 0))
    orders = [set(re.findall(r"\d{5}", " ".join(_texts(rows, 0)))) for rows in (train, held_out)]
    assert len(orders[1]) == NUM_HELD_OUT
    assert not orders[0] & orders[1]


def test_every_intent_is_learnt_and_asked():
    for rows in make_examples():
        found = {text.split("\n")[0].removeprefix("intent: ") for text in _texts(rows, 1)}
        assert found == {intent.name for intent in INTENTS}


def test_files(tmp_path):
    train, held_out = write_dataset(tmp_path)
    assert len(train.read_text().splitlines()) == NUM_TRAIN
    assert json.loads(held_out.read_text().splitlines()[0])["messages"][0]["role"] == "user"


def test_answers_repeat_the_order():
    for row in make_examples()[1]:
        letter, answer = (turn["content"] for turn in row["messages"])
        assert re.findall(r"\d{5}", letter) == re.findall(r"order: (\d{5})$", answer, re.MULTILINE)


def test_wordings_are_in_one_list_only():
    for intent in INTENTS:
        assert not set(intent.wordings) & set(intent.unseen_wordings)
