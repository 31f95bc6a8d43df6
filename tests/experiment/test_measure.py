"""Answers and forgetting of a finished run."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import nibble
from nibble.errors import DataError
from nibble.experiment.measure import GENERAL_FILE, measure
from nibble.model.tokenizer import load_tokenizer
from nibble.train import folder


@pytest.fixture(scope="module")
def finished(tiny_model_folder, tmp_path_factory):
    """A run that learnt one short answer by heart; held out are that one, another, a long one."""
    place = tmp_path_factory.mktemp("measure")
    known = {"prompt": "what", "completion": "ab"}
    held_out = [
        known,
        {"prompt": "why", "completion": "zz"},
        {"prompt": "how", "completion": "x" * 40},
    ]
    for name, rows in (("train", [known] * 8), ("eval", held_out)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (place / f"{name}.jsonl").write_text(text)
    settings = [
        *(f"model.name={tiny_model_folder('llama')}", f"data.train={place / 'train.jsonl'}"),
        *(f"data.eval={place / 'eval.jsonl'}", "data.max_seq_len=96", "data.packing=false"),
        *("train.steps=60", "train.batch_size=4", "train.micro_batch_size=4", "optim.lr=1e-2"),
        *("train.recompute=none", "optim.paged=false", "method=qlora", f"out={place / 'run'}"),
    ]
    nibble.train(nibble.load_config(None, settings))
    return place / "run"


def test_short_answers_are_right_or_wrong_as_a_whole(finished):
    found = measure(finished)
    assert (found["num_short"], found["num_exact"]) == (2, 1)


def test_an_exact_answer_is_the_one_that_is_generated(finished):
    run = folder.read_run(finished)
    model, tokenizer = nibble.load_base(run.model.name, storage="nf4")
    nibble.read_adapter(model, finished / "adapter")
    told = [
        nibble.generate(model, tokenizer, [{"role": "user", "content": text}], max_new_tokens=8)
        for text in ("what", "why")
    ]
    assert told[0] == "ab"
    assert told[1] != "zz"


def test_what_was_forgotten_is_the_loss_of_the_same_tokens(finished):
    found = measure(finished)
    assert found["general_before"] != found["general_after"]
    assert found == measure(finished)
    run = folder.read_run(finished)
    tokens = load_tokenizer(Path(run.model.name))(GENERAL_FILE.read_text()).input_ids
    num_rows = -(-(len(tokens) + 1) // run.data.max_seq_len)
    assert abs(found["num_general_tokens"] - (len(tokens) + 1)) <= num_rows


def test_a_general_text_of_ones_own(finished, tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("A text of one's own.")
    found = measure(finished, str(path))
    assert 10 < found["num_general_tokens"] <= 21
    with pytest.raises(DataError, match=r"none\.txt"):
        measure(finished, str(tmp_path / "none.txt"))


def test_an_adapter_that_is_zero_forgets_nothing(finished, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    from safetensors.torch import load_file, save_file

    path = copy / "adapter" / "adapter_model.safetensors"
    save_file({name: torch.zeros_like(t) for name, t in load_file(path).items()}, path)
    found = measure(copy)
    assert found["general_before"] == found["general_after"]
    assert found["num_exact"] == 0


def test_where_there_is_no_run_it_says_so(tmp_path):
    with pytest.raises(DataError, match="there is no run"):
        measure(tmp_path)
