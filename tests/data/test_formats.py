"""Rows to conversations. Faults are in test_faults.py."""

import pytest

from nibble.data.formats import COMPLETIONS, PROMPTS, detect_format, row_to_conversation


def turns_of(row, format="auto"):
    conversation = row_to_conversation(row, format=format, path="a", line=1)
    return [(m.role, m.content) for m in conversation.messages]


@pytest.mark.parametrize(
    ("columns", "format"),
    [
        (["messages"], "messages"),
        (["prompt", "messages"], "messages"),
        (["id", "conversations"], "sharegpt"),
        (["conversation"], "sharegpt"),
        (["instruction", "input", "output", "text"], "alpaca"),
        (["instruction", "output"], "alpaca"),
        (["instruction", "context", "response", "category"], "alpaca"),
        (["instruction", "response"], "prompt-completion"),
        (["prompt", "completion", "answer"], "prompt-completion"),
        (["text", "meta"], "text"),
    ],
)
def test_detect_format(columns, format):
    assert detect_format(columns) == format


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("completion", COMPLETIONS)
def test_every_pair_of_names(prompt, completion):
    assert turns_of({prompt: "a", completion: "b"}) == [("user", "a"), ("assistant", "b")]


@pytest.mark.parametrize(
    ("row", "question"),
    [
        ({"instruction": "a", "input": "b", "output": "c"}, "a\n\nb"),
        ({"instruction": "a", "input": "", "output": "c"}, "a"),
        ({"instruction": "a", "input": None, "output": "c"}, "a"),
        ({"instruction": "a", "output": "c"}, "a"),
        ({"instruction": "", "input": "b", "output": "c"}, "b"),
        ({"instruction": "a", "context": "b", "response": "c"}, "a\n\nb"),
    ],
)
def test_alpaca_joins_instruction_and_input(row, question):
    assert turns_of(row) == [("user", question), ("assistant", "c")]


def test_system_and_history_columns():
    row = {"system": "s", "history": [["a", "b"]], "prompt": "c", "completion": "d"}
    assert turns_of(row) == [
        ("system", "s"),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
        ("assistant", "d"),
    ]
    assert turns_of({"system": "", "prompt": "c", "completion": "d"})[0] == ("user", "c")


def test_system_column_of_sharegpt():
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    expected = [("system", "s"), ("user", "a"), ("assistant", "b")]
    assert turns_of({"system": "s", "conversations": turns}) == expected
    inside = [{"from": "system", "value": "s"}, *turns]
    assert turns_of({"system": "other", "conversations": inside}) == expected


def test_prompt_and_completion_as_lists_of_turns():
    row = {
        "prompt": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        ],
        "completion": [{"role": "assistant", "content": "d"}],
    }
    messages = row_to_conversation(row, format="auto", path="a", line=1).messages
    assert [(m.content, m.is_trained) for m in messages] == [
        ("a", False),
        ("b", False),
        ("c", False),
        ("d", None),
    ]


def test_origin_format_and_tools_are_kept():
    row = {"prompt": "a", "completion": "", "tools": '[{"name": "f"}]'}
    conversation = row_to_conversation(row, format="auto", path="x", line=9)
    assert (conversation.path, conversation.line) == ("x", 9)
    assert conversation.format == "prompt-completion"
    assert conversation.tools == ({"name": "f"},)
    assert not conversation.is_text
    assert row_to_conversation({"text": "a"}, format="auto", path="", line=1).is_text
