"""What a template refuses or leaves out is folded into a turn that it takes."""

import pytest

from nibble.data.prompt import ChatTemplate, render_turns
from nibble.data.template import TemplateError
from nibble.data.turns import Message

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
ANY = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
STRICT = (
    "{% for m in messages %}"
    "{% if m.role != ['user', 'assistant'][loop.index0 % 2] %}"
    "{{ raise_exception('turns must alternate') }}{% endif %}"
    "<{{ m.role }}>{{ m.content | trim }}{% endfor %}"
)
SILENT = (
    "{% for m in messages %}{% if m.role in ('user', 'assistant') %}"
    "<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}"
)
JSON_TOOL = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.role == 'tool' %}{{ m.content | tojson }}{% else %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }}]{% endfor %}{% endfor %}"
)


def rendered(source, *messages, **more):
    return render_turns(ChatTemplate(source, {"eos_token": "</s>"}), messages, **more)[1]


def conversation():
    return (
        Message("system", "Be brief."),
        Message("user", "1+1?"),
        Message("assistant", "", extra={"tool_calls": [CALL]}),
        Message("tool", "two\nor so"),
        Message("tool", "2"),
        Message("assistant", "Two."),
    )


def test_a_template_that_takes_all_roles_is_left_alone():
    messages = Message("system", "s"), Message("user", "u"), Message("tool", "t")
    assert rendered(ANY, *messages) == "<system>s<user>u<tool>t"


@pytest.mark.parametrize("source", [STRICT, SILENT])
def test_system_goes_before_the_user(source):
    messages = Message("system", "Be brief."), Message("user", "Hi."), Message("assistant", "Yo.")
    assert rendered(source, *messages) == "<user>Be brief.\n\nHi.<assistant>Yo."


@pytest.mark.parametrize("source", [STRICT, SILENT])
def test_everything_is_folded_where_only_two_roles_are_known(source):
    assert rendered(source, *conversation()) == (
        "<user>Be brief.\n\n1+1?"
        '<assistant><tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
        "<user><tool_response>\ntwo\nor so\n</tool_response>\n<tool_response>\n2\n</tool_response>"
        "<assistant>Two."
    )


def test_a_user_turn_after_tool_turns_joins_them():
    messages = (
        Message("user", "a"),
        Message("assistant", "b"),
        Message("tool", "c"),
        Message("user", "d"),
        Message("assistant", "e"),
    )
    assert rendered(STRICT, *messages) == (
        "<user>a<assistant>b<user><tool_response>\nc\n</tool_response>\nd<assistant>e"
    )


def test_tool_results_as_json_and_rendered_calls_are_not_folded():
    assert rendered(JSON_TOOL, *conversation()) == (
        '<system>Be brief.<user>1+1?<assistant>[add]<tool>"two\\nor so"<tool>"2"<assistant>Two.'
    )


def test_a_call_named_only_in_the_tools_is_still_written():
    source = "{% for t in tools %}{{ t.name }};{% endfor %}" + ANY
    text = rendered(source, *conversation()[1:3], tools=[{"name": "add"}])
    assert text.startswith("add;<user>1+1?<assistant><tool_call>")


def test_the_first_refusal_is_the_one_that_is_told():
    with pytest.raises(TemplateError, match="turns must alternate"):
        rendered(STRICT, Message("assistant", "a"))


def test_no_turns():
    assert rendered(ANY) == ""


def test_generation_prompt_reaches_the_template():
    source = ANY + "{% if add_generation_prompt %}<assistant>{% endif %}"
    messages = [Message("user", "a")]
    assert rendered(source, *messages) == "<user>a"
    assert rendered(source, *messages, add_generation_prompt=True) == "<user>a<assistant>"


@pytest.mark.parametrize(
    ("suffix", "marker"),
    [
        ("<end>\n<user>", "<end>"),
        (" </s>", " </s>"),
        ("<end><end>", "<end>"),
        (" ### end\nmore", " ### end"),
        ("\n\nUser:", "\n\nUser:"),
        ("", ""),
        ("\n", ""),
    ],
)
def test_end_marker(suffix, marker):
    template = ChatTemplate("", {}, ("<end>", "</s>", "<end>2"))
    assert template.end_marker(suffix) == marker


def test_last_special_end():
    template = ChatTemplate("", {}, ("<end>",))
    assert template.last_special_end("a<end>b<end>\n") == 12
    assert template.last_special_end("a") is None
