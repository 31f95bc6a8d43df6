"""Greedy answers beside those of the data, in the form that was asked for."""

import pytest

from nibble.data.records import Conversation, Message
from nibble.errors import DataError
from nibble.model.load import load_base
from nibble.serve.answers import Form, exact_matches, last_number, read_prompts
from nibble.serve.generate import generate


@pytest.fixture(scope="module")
def loaded(tiny_model_folder):
    return load_base(str(tiny_model_folder("llama")), "float32")


def talk(*texts, line=1, is_text=False):
    roles = ["user", "assistant"] * len(texts)
    messages = tuple(Message(r, t) for r, t in zip(roles, texts, strict=False))
    return Conversation(messages, "a.jsonl", line, is_text=is_text)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 20", "20"), ("it is $1,080.50.", "1080.5"), ("-3", "-3"), ("10.0", "10"),
        ("1, 2, 300", "300"), ("0.0", "0"), ("100", "100"), (".5", "0.5"), ("none", None),
        ("1,2345", "2345"),
    ],
)  # fmt: skip
def test_the_last_number(text, number):
    assert last_number(text) == number


def test_forms():
    assert Form().of(" a \n b ") == "a b"
    assert Form().of("Yes") != Form().of("yes")
    assert Form(ignore_case=True).of("YES") == "yes"
    assert Form(last_number=True).of("a") is None
    assert Form().can_become("a ", "a b")
    assert not Form().can_become("ab", "a b")
    assert Form(last_number=True).can_become("x", "1")


def test_greedy_answers_count_where_they_are_those_of_the_data(loaded):
    model, tokenizer = loaded
    said = {
        text: generate(model, tokenizer, [{"role": "user", "content": text}], max_new_tokens=5)
        for text in ("one", "two", "three")
    }
    rows = [talk("one", f" {said['one']}\n"), talk("two", "zz"), talk("three", said["three"] + "x")]
    prompts = list(read_prompts(rows, tokenizer, Form()))
    whole = exact_matches(model, tokenizer, prompts, Form(), max_new_tokens=5)
    assert [told.text for told in whole] == list(said.values())
    assert [told.is_exact for told in whole] == [True, False, False]
    done = []
    early = exact_matches(
        model, tokenizer, prompts, Form(), max_new_tokens=5, whole=False, on_done=done.append
    )
    assert [told.is_exact for told in early] == [True, False, False]
    assert sum(done) == 3
    assert len(early[1].text) < len(said["two"])


def test_the_last_answer_is_asked_for_after_the_turns_before_it(loaded):
    _, tokenizer = loaded
    (prompt,) = read_prompts([talk("a", "b", "c", "d", "e")], tokenizer, Form())
    assert prompt.answer == "d"
    text = tokenizer.decode(prompt.ids)
    assert text.endswith("user\nc<|im_end|>\n<|im_start|>assistant\n")


def test_a_prompt_as_long_as_the_context_is_not_answered(loaded):
    model, tokenizer = loaded
    prompts = list(read_prompts([talk("x" * 300, "a")], tokenizer, Form()))
    (told,) = exact_matches(model, tokenizer, prompts, Form())
    assert (told.text, told.is_exact) == (None, False)


def test_bad_rows_are_named_or_handed_over(loaded):
    _, tokenizer = loaded
    rows = [
        talk("a", "b", line=1),
        talk("plain", line=2, is_text=True),
        talk("a", "no number", line=3),
        talk("a<|im_end|>", "4", line=4),
        talk("a", "5", line=5),
    ]
    form = Form(last_number=True)
    with pytest.raises(DataError, match=r"a\.jsonl:2: .*plain text") as info:
        list(read_prompts(rows[1:], tokenizer, form))
    assert info.value.__notes__ == ["no-question"]
    with pytest.raises(DataError, match="holds no number"):
        list(read_prompts(rows, tokenizer, form))
    bad = []
    kept = list(read_prompts(rows, tokenizer, form, on_bad_row=bad.append))
    assert [prompt.line for prompt in kept] == [5]
    assert [error.line for error in bad] == [1, 2, 3, 4]
