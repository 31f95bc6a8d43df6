"""A conversation: who answers, what stays, and what training reads back."""

import json
from contextlib import closing

import pytest
import torch

import nibble
from nibble.adapter.many import Adapters
from nibble.data.chat import tokenize
from nibble.data.records import read_records
from nibble.errors import DataError, UsageError
from nibble.model.load import load_base
from nibble.serve.chat import Chat
from nibble.serve.generate import Sampling, generate


@pytest.fixture(scope="module")
def adapter(tiny_model_folder, tmp_path_factory):
    """A folder of an adapter that changes what the tiny model says."""
    model, _ = load_base(str(tiny_model_folder("llama")), "float32")
    nibble.adapt(model, rank=4, alpha=64)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    return nibble.write_adapter(model, tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def chat(tiny_model_folder, adapter):
    model, tokenizer = load_base(str(tiny_model_folder("llama")), "float32")
    adapters = Adapters(model)
    adapters.load("law", adapter)
    return Chat(model, tokenizer, adapters, sampling=Sampling(max_new_tokens=6))


def say(chat, question):
    """The whole answers, by number."""
    texts = {}
    for part in chat.ask(question):
        texts[part.number] = texts.get(part.number, "") + part.text
    return texts


def test_the_answer_is_that_of_generate_on_the_whole_conversation(chat, tiny_model_folder, adapter):
    chat.system = "Be brief."
    say(chat, "one")
    (told,) = say(chat, "two").values()
    model, tokenizer = load_base(str(tiny_model_folder("llama")), "float32")
    nibble.read_adapter(model, adapter)
    before = [{"role": "system", "content": "Be brief."}, *chat.turns[:2]]
    messages = [*before, {"role": "user", "content": "two"}]
    assert told == generate(model, tokenizer, messages, max_new_tokens=6)
    assert [turn["role"] for turn in chat.turns] == ["user", "assistant"] * 2


def test_base_and_adapter_answer_side_by_side_as_each_alone(chat):
    chat.is_comparing = True
    assert chat.speakers == (None, "law")
    both = say(chat, "one")
    assert both[0] != both[1]
    assert chat.turns[-1]["content"] == both[1]
    chat.reset()
    chat.is_comparing = False
    assert say(chat, "one") == {0: both[1]}
    chat.reset()
    chat.switch("base")
    assert say(chat, "one") == {0: both[0]}


def test_an_answer_that_is_stopped_stays_as_far_as_it_came(chat):
    whole = say(chat, "one")[0]
    chat.reset()
    said = ""
    with closing(chat.ask("one")) as parts:
        for part in parts:
            said += part.text
            if said:
                break
    assert whole.startswith(said)
    assert said != whole
    assert chat.turns[-1] == {"role": "assistant", "content": said}


def test_a_question_that_is_stopped_before_any_answer_is_forgotten(chat):
    with closing(chat.ask("one")) as parts:
        assert parts is not None
    assert chat.turns == []


def test_undo_and_reset(chat):
    say(chat, "one")
    say(chat, "two")
    assert chat.undo()
    assert chat.turns[0]["content"] == "one"
    assert len(chat.turns) == 2
    chat.system = "Be brief."
    chat.reset()
    assert (chat.turns, chat.system, chat.undo()) == ([], "Be brief.", False)


def test_settings(chat):
    chat.set("temperature", "0.7")
    chat.set("top_k", "5")
    chat.set("stop", '["\\n", "x"]')
    chat.set("seed", "none")
    sampling = chat.sampling
    assert (sampling.temperature, sampling.top_k, sampling.seed) == (0.7, 5, None)
    assert sampling.stop == ("\n", "x")
    chat.set("stop", "none")
    chat.set("stop", "END")
    assert chat.sampling.stop == ("END",)
    with pytest.raises(UsageError, match='did you mean "temperature"'):
        chat.set("temprature", "1")
    with pytest.raises(UsageError, match="expected a whole number"):
        chat.set("top_k", "many")
    with pytest.raises(UsageError, match="top_p"):
        chat.set("top_p", "2")
    assert chat.sampling.top_p == 1.0


def test_an_unknown_adapter_is_named_with_the_closest(chat):
    with pytest.raises(UsageError, match='did you mean "law"'):
        chat.switch("lw")
    assert chat.adapter == "law"


def test_a_conversation_longer_than_the_context_offers_to_begin_anew(chat):
    with pytest.raises(UsageError, match=r"context of the model is 256\n.*/reset"):
        chat.ask("a" * 300)
    assert chat.turns == []
    say(chat, "one")


def test_the_longest_answer_ends_with_the_context(chat):
    chat.set("max_new_tokens", "1000")
    say(chat, "a" * 200)
    pace = chat.paces[0]
    assert pace.num_prompt_tokens + pace.num_new_tokens <= 256


def test_what_an_answer_took(chat):
    say(chat, "one")
    (pace,) = chat.paces
    assert pace.adapter == "law"
    assert pace.num_new_tokens <= 6
    assert 0 < pace.first_s <= pace.seconds
    assert pace.tokens_per_s >= 0
    assert chat.num_tokens() >= pace.num_prompt_tokens


def test_saved_conversations_are_rows_that_training_reads_back(chat, tmp_path):
    path = tmp_path / "chats.jsonl"
    chat.system = "Be brief."
    chat.turns = [
        {"role": "user", "content": 'What is\n"it"?'},
        {"role": "assistant", "content": "Grüße."},
    ]
    assert chat.save(path) == 3
    path.write_bytes(path.read_bytes().rstrip(b"\n"))  # as an editor may leave it
    chat.turns *= 2
    assert chat.save(path) == 5
    first, second = read_records(path)
    assert [m.content for m in first.messages] == ["Be brief.", 'What is\n"it"?', "Grüße."]
    assert len(second.messages) == 5
    run = nibble.load_config(
        None,
        [
            f"model.name={chat._model.name_or_path}", f"data.train={path}", "method=lora",
            "data.max_seq_len=128", "train.steps=1", f"out={tmp_path / 'run'}", "optim.paged=false",
        ],
    )  # fmt: skip
    assert nibble.train(run).final_loss > 0


def test_what_training_would_refuse_is_not_saved(chat, tmp_path):
    path = tmp_path / "chats.jsonl"
    with pytest.raises(UsageError, match="nothing to save"):
        chat.save(path)
    chat.turns = [
        {"role": "user", "content": "what does <|im_end|> do?"},
        {"role": "assistant", "content": "a"},
    ]
    with pytest.raises(DataError, match="sign between turns"):
        chat.save(path)
    with pytest.raises(UsageError, match=r"\.jsonl"):
        chat.save(tmp_path / "chats.txt")
    assert not path.exists()


def test_a_model_without_a_template_is_asked_as_in_training(chat, tmp_path):
    chat._tokenizer.chat_template = None
    assert not chat.has_template
    told = say(chat, "one")[0]
    ids = chat._tokenizer("### User:\none\n\n### Assistant:\n").input_ids
    assert chat.paces[0].num_prompt_tokens == len(ids)
    path = tmp_path / "a.jsonl"
    if told:
        chat.save(path)
        (row,) = read_records(path)
        assert tokenize(row, chat._tokenizer).input_ids[: len(ids)] == ids


def test_a_row_of_the_file_is_plain_json(chat, tmp_path):
    chat.turns = [{"role": "user", "content": "é"}, {"role": "assistant", "content": "è"}]
    chat.save(tmp_path / "a.jsonl")
    text = (tmp_path / "a.jsonl").read_text()
    assert json.loads(text) == {"messages": chat.turns}
    assert "é" in text
