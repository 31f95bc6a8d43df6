"""Numbers that JSON has, and tokens that look alike."""

import json
from types import SimpleNamespace

from nibble.serve.choice import Part, Scored
from nibble.serve.refusal import to_json
from nibble.serve.shapes import ChatShape, CompletionShape, Usage


def scored(text, logprob, top):
    return Scored(text, 0, SimpleNamespace(text=text, logprob=logprob, top=top))


def test_of_tokens_that_look_alike_the_likeliest_counts():
    """A harness takes an answer for greedy where its value is the largest of its place."""
    top = ((1, "\ufffd", -0.1), (2, "\ufffd", -2.0), (3, "a", float("-inf")))
    part = Part("", [scored("\ufffd", -2.0, top)], None)
    whole = CompletionShape("m", has_usage=False).whole([[part]], Usage(1, 1))
    assert whole["choices"][0]["logprobs"]["top_logprobs"] == [{"\ufffd": -0.1, "a": -9999.0}]


def test_the_token_itself_is_among_the_likeliest():
    part = Part("", [scored("b", -5.0, ((1, "a", -0.1),))], None)
    whole = CompletionShape("m", has_usage=False).whole([[part]], Usage(1, 1))
    assert whole["choices"][0]["logprobs"]["top_logprobs"] == [{"a": -0.1, "b": -5.0}]


def test_a_part_of_a_character_has_no_bytes():
    part = Part("", [scored("\ufffd", -1.0, ())], "stop")
    chunk = ChatShape("m", has_usage=False).chunk(0, part)
    assert chunk["choices"][0]["logprobs"]["content"][0]["bytes"] is None
    assert chunk["choices"][0]["delta"] == {}
    assert json.loads(to_json(chunk))["choices"][0]["finish_reason"] == "stop"
