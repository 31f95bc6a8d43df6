"""Text that streams is the text of all tokens at once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nibble.model.load import load_base
from nibble.serve.text import TextStream


@pytest.fixture(scope="module")
def tokenizer(tiny_model_folder):
    return load_base(str(tiny_model_folder("llama")), "float32")[1]


@given(st.lists(st.integers(0, 260), max_size=30))
def test_pieces_are_the_whole(tokenizer, tokens):
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokens]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(tokens, skip_special_tokens=True)


def test_a_character_comes_when_it_is_whole(tokenizer):
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokenizer("a€b").input_ids]
    assert pieces == ["a", "", "", "€", "b"]
    assert stream.flush() == ""


@given(st.text("abc", max_size=20), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_text(tokenizer, text, stops):
    stream = TextStream(tokenizer, stops)
    given = ""
    for token in tokenizer(text).input_ids:
        given += stream.push(token)
        if stream.is_stopped:
            break
    given += stream.flush()
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        assert (given, stream.is_stopped) == (text, False)
        return
    # What came when the first stop text was whole; of several the earliest begins the end.
    seen = text[: min(ends)]
    assert stream.is_stopped
    assert given == seen[: min(seen.index(stop) for stop in stops if stop in seen)]


def test_what_may_become_a_stop_text_is_held(tokenizer):
    stream = TextStream(tokenizer, ["end"])
    assert [stream.push(token) for token in tokenizer("xeny").input_ids] == ["x", "", "", "eny"]
