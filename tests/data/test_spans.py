"""Spans of answers in the rendered text, for templates that behave and for some that do not."""

import pytest

from nibble.data.spans import ChatTemplate, render_turns, target_spans
from nibble.data.turns import Conversation, Message

HEAD = "{{ '<|im_start|>' + m.role + '\n' }}"
TAIL = "{{ '<|im_end|>\n' }}"
SPECIALS = ("<|im_start|>", "<|im_end|>", "</s>")


def chat(body, *, prompt="{{ '<|im_start|>assistant\n' }}", specials=SPECIALS, eos=""):
    source = (
        "{% for m in messages %}" + body + "{% endfor %}"
        "{% if add_generation_prompt %}" + prompt + "{% endif %}"
    )
    return ChatTemplate(source, {"eos_token": eos}, specials, eos)


def spans_of(template, conversation, train_on="assistant"):
    text, spans = target_spans(template, conversation, train_on=train_on)
    return [text[start:end] for start, end in spans]


PLAIN = chat(HEAD + "{{ m.content }}" + TAIL)


@pytest.mark.parametrize("answer", ["b", "", " b", "b \n", "\n\nb\n", "  ", "a", "assistant\n"])
def test_keeps_or_strips_outer_space(talk, answer):
    conversation = talk("user: a", f"assistant: {answer}", "user: a", f"assistant: {answer}")
    assert spans_of(PLAIN, conversation) == [answer + "<|im_end|>"] * 2
    stripping = chat(HEAD + "{{ m.content | trim }}" + TAIL)
    assert spans_of(stripping, conversation) == [answer.strip() + "<|im_end|>"] * 2
    left = chat(HEAD + "{{ m.content.lstrip('\n') }}" + TAIL)
    assert spans_of(left, conversation) == [answer.lstrip("\n") + "<|im_end|>"] * 2


def test_train_on_and_weights(talk):
    turns = ("system: s", "user: a", "assistant: b", "user: c", "assistant: d")
    assert spans_of(PLAIN, talk(*turns), "last") == ["d<|im_end|>"]
    text, spans = target_spans(PLAIN, talk(*turns), train_on="all")
    assert spans == [(0, len(text))]
    assert spans_of(PLAIN, talk(*turns, trained={2: False})) == ["d<|im_end|>"]
    assert spans_of(PLAIN, talk(*turns, trained={4: False})) == ["b<|im_end|>"]
    assert spans_of(PLAIN, talk(*turns, trained={4: False}), "last") == []
    assert spans_of(PLAIN, talk(*turns, trained={2: True, 4: True})) == [
        "b<|im_end|>",
        "d<|im_end|>",
    ]


def test_two_markers_after_the_last_turn(talk):
    """Phi-3's way: <|end|> after each turn, and EOS once at the end of a finished text."""
    template = ChatTemplate(
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}</s>{% endif %}",
        {},
        ("</s>",),
        "</s>",
    )
    conversation = talk("user: a", "assistant: b", "user: c", "assistant: d")
    assert spans_of(template, conversation) == ["b<|end|>", "d<|end|>"]


def test_template_without_end_of_turn_gets_eos(talk):
    template = chat("{{ m.role + ': ' + m.content + '\n' }}", eos="</s>")
    conversation = talk("user: a", "assistant: b", "user: c", "assistant: d")
    text, spans = target_spans(template, conversation, train_on="assistant")
    assert text.endswith("assistant: d\n</s>")
    assert [text[a:b] for a, b in spans] == ["b", "d\n</s>"]
    assert spans_of(template, talk("user: a", "assistant: b", "user: c")) == ["b"]


def test_think_blocks_that_a_template_moves(talk):
    """Qwen3's way: thoughts leave earlier turns, and stand in a block of the last."""
    body = (
        "{% if m.role == 'assistant' and '</think>' in m.content %}"
        "{% set c = m.content.split('</think>')[-1].lstrip('\n') %}"
        "{% set r = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
        + HEAD
        + "{% if loop.last %}{{ '<think>\n' + r + '\n</think>\n\n' }}{% endif %}{{ c }}"
        + TAIL
        + "{% else %}"
        + HEAD
        + "{{ m.content }}"
        + TAIL
        + "{% endif %}"
    )
    answer = "<think>\nhm\n</think>\n\nYes"
    conversation = talk("user: a", f"assistant: {answer}", "user: c", f"assistant: {answer}")
    assert spans_of(chat(body), conversation) == ["Yes<|im_end|>", answer + "<|im_end|>"]


def test_template_that_looks_at_the_answer(talk):
    """The marks change what it writes, so the prefix finds the answer."""
    body = HEAD + "{{ m.content }}{% if m.content | length > 2 %} (long){% endif %}" + TAIL
    conversation = talk("user: a", "assistant: b", "user: c", "assistant: dddd")
    assert spans_of(chat(body), conversation) == ["b<|im_end|>", "dddd (long)<|im_end|>"]


def test_answer_found_by_its_text_as_the_last_resort(talk):
    source = (
        "{% if messages | length < 2 or add_generation_prompt %}"
        "{{ raise_exception('no') }}{% endif %}"
        "{{ messages[0].content }}|{{ messages[1].content.replace('\U000f0000', 'x') }}<|im_end|>"
    )
    template = ChatTemplate(source, {}, SPECIALS)
    assert spans_of(template, talk("user: a", "assistant: bb")) == ["bb"]


def test_generation_blocks_decide(talk):
    body = (
        "{% if m.role == 'assistant' %}"
        + HEAD
        + "{% generation %}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}"
        + "{% else %}"
        + HEAD
        + "{{ m.content }}"
        + TAIL
        + "{% endif %}"
    )
    conversation = talk("user: a", "assistant: b", "user: c", "assistant: d")
    assert spans_of(chat(body), conversation) == ["b<|im_end|>\n", "d<|im_end|>\n"]
    assert spans_of(chat(body), conversation, "last") == ["d<|im_end|>\n"]


CALL = {"type": "function", "function": {"name": "sky", "arguments": {"day": 1}}}


def with_call(content=""):
    messages = (
        Message("user", "a"),
        Message("assistant", content, extra={"tool_calls": [CALL]}),
        Message("tool", "blue"),
        Message("assistant", "Blue."),
    )
    return Conversation(messages, "a", 1)


def test_rendered_tool_calls_are_targets():
    body = HEAD + (
        "{{ m.content }}{% for c in m.tool_calls or [] %}"
        "<call>{{ c.function | tojson }}</call>{% endfor %}" + TAIL
    )
    call = '<call>{"name": "sky", "arguments": {"day": 1}}</call><|im_end|>'
    assert spans_of(chat(body), with_call()) == [call, "Blue.<|im_end|>"]
    assert spans_of(chat(body), with_call("Hm. ")) == ["Hm. " + call, "Blue.<|im_end|>"]


def test_ignored_tool_calls_are_written_into_the_text():
    call = '<tool_call>\n{"name": "sky", "arguments": {"day": 1}}\n</tool_call><|im_end|>'
    assert spans_of(PLAIN, with_call()) == [call, "Blue.<|im_end|>"]
    assert spans_of(PLAIN, with_call("Hm.")) == ["Hm.\n" + call, "Blue.<|im_end|>"]


def test_tools_reach_the_template():
    template = ChatTemplate(
        "{{ tools | tojson }}{{ messages[-1].content }}<|im_end|>", {}, SPECIALS
    )
    tools = ({"name": "sky"},)
    conversation = Conversation(
        (Message("user", "a"), Message("assistant", "b")), "", 0, tools=tools
    )
    text, spans = target_spans(template, conversation, train_on="assistant")
    assert text == '[{"name": "sky"}]b<|im_end|>'
    assert [text[a:b] for a, b in spans] == ["b<|im_end|>"]


def test_system_turn_that_the_template_drops_is_folded():
    body = "{% if m.role != 'system' %}" + HEAD + "{{ m.content }}" + TAIL + "{% endif %}"
    messages = [Message("system", "S"), Message("user", "a")]
    turns, text = render_turns(chat(body), messages)
    assert turns == [{"role": "user", "content": "S\n\na"}]
    assert text == "<|im_start|>user\nS\n\na<|im_end|>\n"


def test_marks_avoid_characters_of_the_data(talk):
    conversation = talk("user: \U000f0000", "assistant: \U000f0001b")
    assert spans_of(PLAIN, conversation) == ["\U000f0001b<|im_end|>"]
