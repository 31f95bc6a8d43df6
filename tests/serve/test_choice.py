"""Where tokens begin in the text of an answer."""

from types import SimpleNamespace

from nibble.serve.choice import Choice
from nibble.serve.prompts import Echo
from nibble.serve.text import TextStream

from .fake import ByteTokenizer


def piece(token, text, finish=None):
    logprob = SimpleNamespace(text=chr(token or 0), logprob=-1.0, top=())
    return SimpleNamespace(token=token, text=text, logprob=logprob, finish=finish)


def choice(**more):
    return Choice(SimpleNamespace(prompt_logprobs=[]), stream=TextStream(ByteTokenizer()), **more)


def test_bytes_of_a_character_begin_where_it_does():
    made = choice()
    letters = [(98, "b"), (0xC3, ""), (0xA9, "é"), (99, "c")]
    parts = [made.take(piece(token, text)) for token, text in letters]
    assert [part.scored[0].offset for part in parts] == [0, 1, 1, 2]


def test_text_that_is_held_back_counts():
    """A stop text may begin with it; the next token stands behind it all the same."""
    made = choice()
    parts = [made.take(piece(97, "")), made.take(piece(98, "ab"))]
    assert [part.scored[0].offset for part in parts] == [0, 1]


def test_an_echo_comes_first_and_once():
    made = choice(echo=Echo("héllo"))
    assert [made.take(piece(97, "a")).text, made.take(piece(98, "b")).text] == ["hélloa", "b"]
    assert made.take(piece(99, "c")).scored[0].offset == 7


def test_the_end_is_told_where_it_is_asked_for():
    end = piece(None, "", "stop")
    assert choice().take(end).scored == []
    assert len(choice(has_end=True).take(end).scored) == 1
    assert choice().take(SimpleNamespace(token=97, text="", logprob=None, finish=None)).is_empty
