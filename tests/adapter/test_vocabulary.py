"""Tokenizers as llama.cpp keeps them: the same ids, or a refusal."""

import json

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from nibble.adapter.vocabulary import (
    _PRE,
    BYTE,
    CONTROL,
    NORMAL,
    UNUSED,
    build_tokenizer,
    check_ids,
    end_of_turn,
    portable_template,
    read_vocabulary,
)
from nibble.errors import UnavailableError
from nibble.model.tokenizer import load_tokenizer


@pytest.fixture
def base(shared):
    return load_tokenizer(shared / "models" / "base-16m")


@pytest.fixture
def stories(shared):
    return load_tokenizer(shared / "models" / "stories260K")


def test_bytes_as_letters(base):
    found = read_vocabulary(base, 8200)
    assert (found.model, found.pre, found.adds_bos) == ("gpt2", "gpt-2", False)
    assert found.special == {"bos": 0, "eos": 0, "eot": 2, "padding": 3}
    assert (found.types[2], found.types[4], found.types[8192]) == (CONTROL, NORMAL, UNUSED)
    assert found.tokens[8199] == "[PAD8199]"
    assert found.template == base.chat_template


def test_characters_with_scores(stories):
    found = read_vocabulary(stories, 512)
    assert (found.model, found.pre, found.adds_bos, found.adds_space) == (
        "llama", "default", True, True,
    )  # fmt: skip
    assert found.types[3] == BYTE
    first = [pair for pair in json.loads(stories.backend_tokenizer.to_str())["model"]["merges"][:3]]
    scores = [found.scores[found.tokens.index("".join(pair))] for pair in first]
    assert scores == [0.0, -1.0, -2.0]
    assert found.template.startswith("{{ bos_token }}")


def test_whole_file_of_each_domain_gives_the_same_ids(base, stories, shared):
    texts = [path.read_text()[:20_000] for path in sorted((shared / "data").rglob("eval.jsonl"))]
    assert len(texts) == 5
    check_ids(read_vocabulary(base, 8192), base, texts)
    check_ids(read_vocabulary(stories, 512), stories, texts)


def test_a_wrong_splitting_is_noticed(base):
    import dataclasses

    wrong = dataclasses.replace(read_vocabulary(base, 8192), pre="qwen2")
    with pytest.raises(UnavailableError, match="otherwise, from token"):
        check_ids(wrong, base)


def test_special_tokens_in_text(base):
    built = build_tokenizer(read_vocabulary(base, 8192))
    assert built.encode("<|im_start|>user").ids[0] == 1


def _edited(tokenizer, edit):
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    edit(parts)
    made = Tokenizer.from_str(json.dumps(parts))
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|endoftext|>", chat_template=tokenizer.chat_template
    )


SPLITS = {
    "llama-bpe": (0, True), "smaug-bpe": (0, False), "qwen2": (1, False),
    "tekken": (2, True), "gpt-4o": (3, False),
}  # fmt: skip


@pytest.mark.parametrize("name", SPLITS)
def test_patterns_get_their_names(base, name):
    (pattern,), takes_words = next(key for key, pre in _PRE.items() if pre == name)
    split = {
        "type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False,
    }  # fmt: skip
    bytes_only = {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False,
    }  # fmt: skip

    def edit(parts):
        parts["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, bytes_only]}
        parts["model"]["ignore_merges"] = takes_words

    assert read_vocabulary(_edited(base, edit), 8192).pre == name


def test_falcons_steps_get_their_name(base):
    steps = [
        {"type": "Punctuation", "behavior": "Contiguous"},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        {"type": "Digits", "individual_digits": False},
        {"type": "Split", "pattern": {"Regex": "[0-9][0-9][0-9]"}, "behavior": "Isolated",
         "invert": False},
    ]  # fmt: skip

    def edit(parts):
        parts["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}

    assert read_vocabulary(_edited(base, edit), 8192).pre == "falcon"


UNREADABLE = {
    "prefix": (lambda p: p["pre_tokenizer"].update(add_prefix_space=True), "splitting text by"),
    "no splitting": (lambda p: p.update(pre_tokenizer=None), "splitting text by"),
    "lower case": (lambda p: p.update(normalizer={"type": "Lowercase"}), "changes text by"),
    "words first": (lambda p: p["model"].update(ignore_merges=True), "splitting text by"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_llama_cpp_does_not_do(base, case):
    edit, message = UNREADABLE[case]
    with pytest.raises(UnavailableError, match=message):
        read_vocabulary(_edited(base, edit), 8192)


def test_no_bytes_no_file(shared):
    tokenizer = load_tokenizer(shared / "models" / "babyllama-105")
    with pytest.raises(UnavailableError, match="no tokens for single bytes"):
        read_vocabulary(tokenizer, 105)


def test_pairs_that_are_never_merged(stories):
    parts = json.loads(stories.backend_tokenizer.to_str())
    parts["model"]["merges"] = parts["model"]["merges"][:-1]
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(parts)), bos_token="<s>", eos_token="</s>"
    )
    with pytest.raises(UnavailableError, match="never merges"):
        read_vocabulary(made, 512)


def test_more_tokens_than_rows(base):
    with pytest.raises(UnavailableError, match="no row in the embedding"):
        read_vocabulary(base, 8000)


def test_template_and_end_of_turn(base, stories):
    assert end_of_turn(base) == 2
    assert end_of_turn(stories) == 2
    base.chat_template = None
    assert "bos_token" not in portable_template(base)
    assert end_of_turn(base) == 0
