"""Tokens and labels: exactly the assistant's text and its end of turn."""

import json
import re
from pathlib import Path

import pytest

from nibble.data.chat import prompt_ids, render_prompt, tokenize, tokenize_all
from nibble.data.records import read_records
from nibble.data.template import PLAIN_TEMPLATE
from nibble.errors import ModelError

GOLDEN = Path(__file__).parents[1] / "golden"


def targets(example, tokenizer):
    return tokenizer.decode([label for label in example.labels if label != -100])


def check_golden(golden, tokenizer, name):
    masks = json.loads((GOLDEN / name).read_text(encoding="utf-8"))
    assert golden.masks(tokenizer) == masks
    for case, template, format, _, turns in golden.cases():
        trained = re.findall(r"\[\[(.*?)\]\]", masks[case], flags=re.DOTALL)
        expected = golden.expected_targets(template, format, turns, tokenizer.eos_token)
        assert len(trained) == len(expected), case
        for text, wanted in zip(trained, expected, strict=True):
            # one token may hold the template's space before an answer and its first letter
            with_space = f" {wanted}" if template == "mistral" else wanted
            assert text in (wanted, with_space), case


def test_masks_equal_golden(golden, byte_tokenizer):
    check_golden(golden, byte_tokenizer, "masks.json")


@pytest.fixture(scope="module")
def base_tokenizer(shared):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(shared / "models" / "base-16m")


def test_masks_equal_golden_on_a_trained_tokenizer(golden, base_tokenizer):
    template = base_tokenizer.chat_template
    try:
        check_golden(golden, base_tokenizer, "masks_base16m.json")
    finally:
        base_tokenizer.chat_template = template


def test_labels_repeat_input_ids_unshifted(byte_tokenizer, talk):
    example = tokenize(talk("user: a", "assistant: héllo 🙂"), byte_tokenizer)
    assert len(example.labels) == len(example.input_ids)
    pairs = zip(example.input_ids, example.labels, strict=True)
    assert all(label in (-100, token) for token, label in pairs)
    assert (example.path, example.line, example.is_text) == ("talk.jsonl", 7, False)


@pytest.mark.parametrize("name", ["biomedical", "legal", "customer", "code", "maths"])
def test_real_sets_train_every_answer_and_nothing_else(shared, base_tokenizer, name):
    rows = list(read_records(shared / "data" / name / "eval.jsonl"))
    for row, example in zip(rows, tokenize_all(rows, base_tokenizer), strict=True):
        answers = [m.content + "<|im_end|>" for m in row.messages if m.role == "assistant"]
        assert targets(example, base_tokenizer) == "".join(answers)


def test_tokens_equal_transformers(shared, base_tokenizer):
    rows = list(read_records(shared / "data" / "legal" / "eval.jsonl"))[:20]
    for row in rows:
        turns = [{"role": m.role, "content": m.content} for m in row.messages]
        expected = base_tokenizer.apply_chat_template(turns, return_dict=False)
        assert tokenize(row, base_tokenizer).input_ids == expected


def test_plain_template_on_a_tokenizer_without_one(shared, talk):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "stories260K")
    assert tokenizer.chat_template is None
    example = tokenize(talk("user: Who?", "assistant: Lily was."), tokenizer)
    assert example.input_ids.count(tokenizer.bos_token_id) == 1
    assert example.input_ids[0] == tokenizer.bos_token_id
    assert targets(example, tokenizer) == "Lily was.</s>"
    text = tokenizer.decode(example.input_ids)
    assert text == "<s> ### User:\nWho?\n\n### Assistant:\nLily was.</s> \n\n"


def test_bos_is_never_doubled(golden, byte_tokenizer, talk):
    for name, template in golden.TEMPLATES.items():
        byte_tokenizer.chat_template = template
        ids = tokenize(talk("user: a", "assistant: b"), byte_tokenizer).input_ids
        assert ids.count(byte_tokenizer.bos_token_id) == (name != "chatml")


def test_prompt_is_the_beginning_of_the_example(golden, byte_tokenizer, talk):
    conversation = talk("system: s", "user: a", "assistant: b")
    for template in [*golden.TEMPLATES.values(), PLAIN_TEMPLATE]:
        byte_tokenizer.chat_template = template
        prompt = prompt_ids(conversation.messages[:-1], byte_tokenizer)
        example = tokenize(conversation, byte_tokenizer)
        assert example.input_ids[: len(prompt)] == prompt
        assert all(label == -100 for label in example.labels[: len(prompt)])


def test_render_prompt_takes_plain_dicts(byte_tokenizer):
    text = render_prompt([{"role": "user", "content": "a"}], byte_tokenizer)
    assert text == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"


def test_text_document_is_all_target_and_ends_with_eos(byte_tokenizer, write):
    (row,) = read_records(write("a.txt", "one\r\n\r\ntwo\n"))
    example = tokenize(row, byte_tokenizer)
    assert example.labels == example.input_ids
    assert byte_tokenizer.decode(example.input_ids) == "one\n\ntwo\n</s>"
    (row,) = read_records(write("b.txt", "one</s>"))
    assert tokenize(row, byte_tokenizer).input_ids.count(byte_tokenizer.eos_token_id) == 1


def test_token_over_the_border_is_a_target(byte_tokenizer, golden, talk):
    """ĠH holds the template's space and the answer's first letter."""
    byte_tokenizer.chat_template = golden.MISTRAL
    example = tokenize(talk("user: a", "assistant: Hi"), byte_tokenizer)
    assert targets(example, byte_tokenizer) == " Hi </s>"


def test_padding_plays_no_part(byte_tokenizer, talk):
    byte_tokenizer.pad_token = "<|im_end|>"
    try:
        example = tokenize(talk("user: a", "assistant: b"), byte_tokenizer)
        assert targets(example, byte_tokenizer) == "b<|im_end|>"
    finally:
        byte_tokenizer.pad_token = None


def test_bad_rows_are_handed_over_and_the_rest_goes_on(byte_tokenizer, golden, talk):
    byte_tokenizer.chat_template = golden.MISTRAL
    rows = [talk("user: a", "assistant: b"), talk("assistant: b", "system: x")]
    bad = []
    examples = list(tokenize_all(rows, byte_tokenizer, on_bad_row=bad.append))
    assert len(examples) == 1
    assert "Only user, assistant and tool" in bad[0].reason


def test_a_tokenizer_without_offsets_is_refused(talk):
    with pytest.raises(ModelError, match="offsets"):
        tokenize(talk("user: a", "assistant: b"), object())
