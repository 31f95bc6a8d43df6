"""Bodies: what is computed, what is ignored, what is refused and in which words."""

import json

import pytest

from nibble.serve.refusal import Refusal
from nibble.serve.requests import ChatRequest, CompletionRequest, LoadRequest, read_request

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "m", "prompt": "hi"}


def read(kind, values):
    return read_request(kind, json.dumps(values).encode())


def refusal(kind, values):
    with pytest.raises(Refusal) as found:
        read(kind, values)
    assert found.value.status == 400
    return found.value


def test_defaults_are_those_of_openai():
    asked = read(ChatRequest, CHAT)
    assert asked.draws() == [
        {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "stop": (), "seed": None}
    ]
    assert asked.num_logprobs is None
    assert asked.num_new_tokens is None


def test_every_field_that_is_computed():
    values = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "seed": 3, "stop": ["a", "b"], "n": 2}
    asked = read(ChatRequest, CHAT | values | {"logprobs": True, "top_logprobs": 4})
    assert [draw["seed"] for draw in asked.draws()] == [3, 4]
    assert asked.draws()[0] == {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "stop": ("a", "b"),
        "seed": 3,
    }
    assert asked.num_logprobs == 4


def test_null_is_the_same_as_nothing():
    names = ("temperature", "top_p", "seed", "stop", "n", "stream", "max_tokens", "logprobs")
    asked = read(CompletionRequest, TEXT | dict.fromkeys(names))
    assert asked.draws() == read(CompletionRequest, TEXT).draws()


def test_a_temperature_near_zero_is_zero_and_a_negative_seed_is_a_seed():
    (draw,) = read(ChatRequest, CHAT | {"temperature": 1e-300, "seed": -1}).draws()
    assert draw["temperature"] == 0
    assert draw["seed"] == 2**63 - 1


def test_the_newer_name_of_a_length_counts():
    values = {"max_tokens": 5, "max_completion_tokens": 7}
    assert read(ChatRequest, CHAT | values).num_new_tokens == 7


@pytest.mark.parametrize(
    "more",
    [
        {"user": "a", "metadata": {"k": "v"}, "store": True, "service_tier": "auto"},
        {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}},
        {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}},
        {"tools": None, "logit_bias": None, "response_format": None},
    ],
)
def test_what_changes_no_answer_is_ignored(more):
    assert read(ChatRequest, CHAT | more) == read(ChatRequest, CHAT)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("response_format", {"type": "json_object"}),
        ("presence_penalty", 0.5),
        ("logit_bias", {"1": 5}),
        ("best_of", 2),
        ("frequency_penalty", False),
        ("reasoning_effort", "high"),
    ],
)
def test_what_would_change_the_answer_is_refused(name, value):
    found = refusal(ChatRequest, CHAT | {name: value})
    assert (found.param, found.code) == (name, "unsupported_parameter")
    assert f"{name} = " in found.message


def test_an_unknown_field_says_which_was_meant():
    found = refusal(CompletionRequest, {"model": "m", "promt": "hi"})
    assert found.code == "unknown_parameter"
    assert 'did you mean "prompt"' in found.message


def test_a_missing_field_is_named():
    assert refusal(ChatRequest, {"model": "m"}).message == "the field 'messages' is missing"


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"model": 3}, "model"),
        ({"model": ""}, "model"),
        ({"model": "x" * 200}, "model"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": True}, "top_p"),
        ({"seed": 1.5}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"stream": 1}, "stream"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": "x" * 1001}, "stop"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1e9}, "max_tokens"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"other": 1}}, "stream_options.other"),
    ],
)
def test_wrong_types_and_ranges(values, param):
    for kind, whole in ((ChatRequest, CHAT), (CompletionRequest, TEXT)):
        assert refusal(kind, whole | values).param == param


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages.0"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_wrong_chats(values, param):
    assert refusal(ChatRequest, CHAT | values).param == param


@pytest.mark.parametrize(
    "prompt", [None, 3, [], [[]], ["a", 1], [1, "a"], [-1], [1.5], {"a": 1}, [2**63], ["a"] * 129]
)
def test_wrong_prompts(prompt):
    found = refusal(CompletionRequest, {"model": "m", "prompt": prompt})
    assert found.param == "prompt"


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"null", b"[]", b"3", b"\xff", b'{"model": "\xff"}', b'{"model": "\\ud800"}',
        b'{"temperature": NaN}', b'{"a": ' + b"[" * 5000, b'{"a": ' + b"1" * 5000 + b"}",
        b"\xef\xbb\xbf{}",
    ],
)  # fmt: skip
def test_bodies_that_are_no_json_object(body):
    with pytest.raises(Refusal) as found:
        read_request(ChatRequest, body)
    assert (found.value.status, found.value.code) == (400, "invalid_json")


def test_messages_stay_short_whatever_came():
    found = refusal(ChatRequest, CHAT | {"temperature": "x" * 100_000})
    assert len(found.message) < 400
    found = refusal(ChatRequest, CHAT | {"x" * 100_000: 1})
    assert len(found.message) < 400


@pytest.mark.parametrize("name", ["", "a b", "../up", "-x", "x" * 129, "a\n"])
def test_wrong_names_of_adapters(name):
    assert refusal(LoadRequest, {"lora_name": name, "lora_path": "x"}).param == "lora_name"
