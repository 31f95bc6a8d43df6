"""Turns: roles, parts, weights and tool calls. Faults are in test_faults.py."""

import pytest

from nibble.data.turns import Message, Place, read_turns

PLACE = Place("a.jsonl", 1)


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("human", "user"),
        ("user", "user"),
        ("gpt", "assistant"),
        ("chatgpt", "assistant"),
        ("assistant", "assistant"),
        ("Assistant", "assistant"),
        ("system", "system"),
        ("developer", "system"),
        ("tool", "tool"),
        ("function", "tool"),
    ],
)
def test_roles(name, role):
    (message,) = read_turns([{"from": name, "value": "x"}], "conversations", PLACE)
    assert message == Message(role, "x")


def test_parts_of_text_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    (message,) = read_turns([{"role": "user", "content": parts}], "messages", PLACE)
    assert message.content == "ab"


@pytest.mark.parametrize(
    ("weight", "expected"), [(None, None), (0, False), (1, True), (1.0, True), (False, False)]
)
def test_weight(weight, expected):
    turns = [{"role": "assistant", "content": "a", "weight": weight}]
    assert read_turns(turns, "messages", PLACE)[0].is_trained is expected


def test_tool_calls_come_in_one_form():
    inner = {"name": "f", "arguments": '{"x": 1}'}
    turns = [
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": inner}]},
        {"role": "tool", "content": "y", "tool_call_id": "1", "name": "f"},
    ]
    call, answer = read_turns(turns, "messages", PLACE)
    function = {"name": "f", "arguments": {"x": 1}}
    assert call.content == ""
    assert call.extra == {"tool_calls": [{"id": "1", "type": "function", "function": function}]}
    assert answer.extra == {"tool_call_id": "1", "name": "f"}


def test_role_and_content_under_conversations():
    (message,) = read_turns([{"role": "assistant", "content": ""}], "conversations", PLACE)
    assert message == Message("assistant", "")
