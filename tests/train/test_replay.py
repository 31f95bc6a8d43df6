"""A run is repeated bit by bit, or it is said why not."""

import json
import os
import shutil
import signal
from contextlib import closing
from dataclasses import replace

import pytest
import torch

import nibble
from nibble.errors import (
    DataError,
    FolderInUseError,
    NibbleError,
    StoppedError,
    UnavailableError,
    UsageError,
)
from nibble.events import EventLog, RunStart, StepEnd, read_events
from nibble.train import checkpoint, trainer
from nibble.train.manifest import MANIFEST_FILE
from nibble.train.replay import replay


@pytest.fixture(scope="module")
def finished(tiny_model_folder, tmp_path_factory):
    """A folder with a model, rows, and a finished run."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(tiny_model_folder("llama"), folder / "model")
    rows = [{"prompt": f"say {n}", "completion": f"{n}"} for n in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [
        *(f"model.name={folder / 'model'}", f"data.train={folder / 'rows.jsonl'}"),
        *("data.eval=0.2", f"out={folder / 'run'}", "method=qlora", "train.steps=4"),
        *("train.batch_size=4", "train.micro_batch_size=2", "lora.dropout=0.1"),
        *("data.max_seq_len=64", "train.exactness=exact", "train.eval_every=2"),
    ]
    nibble.train(nibble.load_config(None, settings))
    return folder


def _change_manifest(finished, section, **values):
    path = finished / "run" / MANIFEST_FILE
    content = json.loads(path.read_text())
    content[section].update(values)
    path.write_text(json.dumps(content))


def test_the_same_comes_out(finished, tmp_path):
    result = replay(finished / "run", tmp_path / "again")
    assert list(result.sha256) == ["adapter_model.safetensors"]
    assert (result.num_steps, result.num_evals) == (4, 3)
    assert "exact: the same inputs" in (tmp_path / "again" / "adapter" / "README.md").read_text()


def test_threads_are_those_of_the_run(finished, tmp_path, monkeypatch):
    before, taken = torch.get_num_threads(), []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    replay(finished / "run", tmp_path / "again")
    assert set(taken) == {before}


def test_one_that_was_stopped_goes_on(finished, tmp_path):
    def stop_after_two(event):
        if isinstance(event, StepEnd) and event.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(StoppedError, match="step 2 of 4 is saved"):
        replay(finished / "run", tmp_path / "again", stop_after_two)
    again = replay(finished / "run", tmp_path / "again")
    steps = [e for e in read_events(tmp_path / "again" / "events.jsonl") if isinstance(e, StepEnd)]
    assert [event.step for event in steps] == [1, 2, 3, 4]
    assert replay(finished / "run", tmp_path / "again") == again


@pytest.fixture
def finished_copy(finished, tmp_path):
    shutil.copytree(finished / "run", tmp_path / "run")
    return tmp_path / "run"


def _say_it_went_on_with_other(out, *names, loss=None):
    """And came out with another loss of the last step, if one is given."""
    events = list(read_events(out / "events.jsonl"))
    steps = [event for event in events if isinstance(event, StepEnd)]
    with closing(EventLog(out / "events.jsonl")) as log:
        log(RunStart("qlora", "m", "cpu", 4, 2, 1, 0, {}, 1, changed=[*names]))
        log(replace(steps[-1], loss=loss or steps[-1].loss))
        log(events[-1])


def test_a_run_that_was_changed_on_its_way_is_refused(finished_copy, tmp_path):
    _say_it_went_on_with_other(finished_copy, "optim.lr", "threads", "data")
    with pytest.raises(DataError, match=r"changed on its way \(data, optim\.lr\)"):
        replay(finished_copy, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_change_on_the_way_that_gave_the_same_bits_is_equal(finished_copy, tmp_path):
    _say_it_went_on_with_other(finished_copy, "threads")
    assert replay(finished_copy, tmp_path / "again").num_steps == 4


def _flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


LOSSES = {
    "an adapter with another byte": (
        lambda out: _flip(out / "adapter" / "adapter_model.safetensors"),
        "adapter_model.safetensors is not what the run wrote",
    ),
    "no adapter": (
        lambda out: shutil.rmtree(out / "adapter"),
        "adapter_model.safetensors is not what the run wrote",
    ),
    "no manifest": (lambda out: (out / MANIFEST_FILE).unlink(), "does not say what the run was"),
    "a step that is not there": (
        lambda out: _keep_lines(out, lambda event: event.get("step") != 3),
        "does not have every step",
    ),
    "no digests": (
        lambda out: _keep_lines(out, lambda event: not event.pop("adapter_sha256", None) or event),
        "does not say what the run wrote",
    ),
}


def _keep_lines(out, is_kept):
    path = out / "events.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(event) + "\n" for event in events if is_kept(event)))


@pytest.mark.parametrize("loss", LOSSES)
def test_what_the_run_wrote_has_to_be_there(finished_copy, tmp_path, loss):
    lose, message = LOSSES[loss]
    lose(finished_copy)
    with pytest.raises(DataError, match=message):
        replay(finished_copy, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_another_environment_on_the_way_may_have_given_other_bits(finished_copy, tmp_path):
    _say_it_went_on_with_other(finished_copy, "threads", loss=9.0)
    with pytest.raises(UnavailableError, match=r"throughout \(threads on the way\)"):
        replay(finished_copy, tmp_path / "again")


def test_smaller_passes_as_memory_ran_short_may_have_given_other_bits(
    finished_copy, tmp_path, monkeypatch
):
    found = checkpoint.latest

    def smaller(folder):
        whole, damages = found(folder)
        if whole and folder.parent == finished_copy:
            whole = replace(whole, state=replace(whole.state, micro_batch_size=1))
        return whole, damages

    monkeypatch.setattr(checkpoint, "latest", smaller)
    _say_it_went_on_with_other(finished_copy, loss=9.0)
    with pytest.raises(UnavailableError, match=r"\(rows in a forward pass: 1 -> 2\)"):
        replay(finished_copy, tmp_path / "again")


def test_other_data_is_found_before_anything_runs(finished, tmp_path):
    rows = finished / "rows.jsonl"
    before = rows.read_text()
    rows.write_text(before.replace("say 3", "tell 3"))
    try:
        with pytest.raises(DataError, match=r"was made of something else \(data: ") as error:
            replay(finished / "run", tmp_path / "again")
    finally:
        rows.write_text(before)
    assert "rows: " in error.value.what
    assert not (tmp_path / "again").exists()


def test_a_folder_with_content_is_refused(finished, tmp_path):
    (tmp_path / "file").write_text("")
    for into in (tmp_path, tmp_path / "file", finished / "run", finished / "run" / "below"):
        with pytest.raises(FolderInUseError, match="is not empty"):
            replay(finished / "run", into)


def test_no_finished_run(finished, tmp_path):
    shutil.copytree(finished / "run", tmp_path / "run")
    (tmp_path / "run" / "events.jsonl").write_text("")
    for out in (tmp_path / "none", tmp_path / "run"):
        with pytest.raises(UsageError, match="there is no finished run in"):
            replay(out, tmp_path / "again")


@pytest.fixture
def other_bits(monkeypatch):
    """Every learning rate is a little larger than it was."""
    rate = trainer.learning_rate
    monkeypatch.setattr(trainer, "learning_rate", lambda *a, **k: 1.01 * rate(*a, **k))


def test_other_bits_in_the_same_environment(finished, tmp_path, other_bits):
    with pytest.raises(NibbleError, match="inputs and environment are the same") as error:
        replay(finished / "run", tmp_path / "again")
    assert "from the training loss of step 2 on" in error.value.what
    assert error.value.exit_code == 1


def test_other_bits_in_another_environment(finished, tmp_path, other_bits):
    before = (finished / "run" / MANIFEST_FILE).read_text()
    _change_manifest(finished, "environment", torch="1.0")
    try:
        with pytest.raises(UnavailableError, match=r"\(torch: 1\.0 -> ") as error:
            replay(finished / "run", tmp_path / "again")
    finally:
        (finished / "run" / MANIFEST_FILE).write_text(before)
    assert error.value.exit_code == 69
