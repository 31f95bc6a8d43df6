"""Whose folder it is."""

import json
from contextlib import closing

import pytest

from nibble.config import load_config
from nibble.errors import DiskError, FolderInUseError, UsageError
from nibble.events import EventLog, RunEnd, RunStart
from nibble.train import folder


def _run(path, *more):
    return load_config(None, [f"out={path}", "model.name=m", *more])


def _enter(run, **more):
    with folder.hold(folder.folder_of(run)):
        changed = folder.check_changes(run, **more)
        folder.write_run(run)
        return changed


def test_run_file_is_a_recipe_with_origins(tmp_path):
    run = _run(tmp_path / "a", "optim.lr=1e-5", "lora.target=[q_proj, v_proj]")
    run = run.with_values({"method": "lora"}, "planner")
    assert _enter(run) == {}
    text = (tmp_path / "a" / "run.yaml").read_text()
    assert "  lr: 1e-05  # flag" in text
    read = folder.read_run(tmp_path / "a")
    assert read.flat() == run.flat()
    assert (read.origin("method"), read.origin("lora.rank")) == ("planner", "default")
    assert load_config(tmp_path / "a" / "run.yaml").flat() == run.flat()


def test_something_else_in_the_folder(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with (
        pytest.raises(FolderInUseError, match=r"holds something else \(thesis.txt\)"),
        folder.hold(tmp_path),
    ):
        pass
    assert (tmp_path / "thesis.txt").read_text() == "precious"
    with pytest.raises(FolderInUseError, match="is a file"), folder.hold(tmp_path / "thesis.txt"):
        pass


def test_a_config_of_the_users_own_is_no_run(tmp_path):
    """A run.yaml alone; with a lock or events beside it, as a run leaves it, it is one."""
    (tmp_path / "run.yaml").write_text("model:\n  name: m\n")
    with (
        pytest.raises(FolderInUseError, match=r"holds something else \(run.yaml\)"),
        folder.hold(tmp_path),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]
    (tmp_path / "events.jsonl").write_text("")
    with folder.hold(tmp_path):
        pass


def test_a_name_that_no_disk_takes(tmp_path):
    long = tmp_path / ("x" * 300)
    with pytest.raises(DiskError, match="cannot use the output folder"), folder.hold(long):
        pass
    with pytest.raises(DiskError, match="cannot use the output folder"):
        folder.refuse_content(long)


def test_a_lock_that_was_left_is_no_content(tmp_path):
    (tmp_path / ".lock").write_text("")
    folder.refuse_content(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(FolderInUseError, match="is not empty"):
        folder.refuse_content(tmp_path)


def test_what_is_refused_leaves_what_stands(tmp_path):
    run = _run(tmp_path / "a")
    _enter(run)
    (tmp_path / "a" / "checkpoints").mkdir()
    with pytest.raises(UsageError, match=r"--allow-change lora\.rnk") as error:
        _enter(_run(tmp_path / "a", "lora.rank=8"), allow_change=["lora.rnk"])
    assert "lora.rank" in error.value.fix
    with folder.hold(tmp_path / "a"):
        assert folder.check_changes(_run(tmp_path / "a", "lora.rank=8"), ["lora.rank", "data"])
    assert folder.read_run(tmp_path / "a").flat() == run.flat()


def test_a_run_that_died_while_it_wrote_its_first_file(tmp_path):
    (tmp_path / ".run.yaml.tmp").write_text("mod")
    assert _enter(_run(tmp_path)) == {}
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "run.yaml"]


def test_another_config_in_the_folder(tmp_path):
    _enter(_run(tmp_path / "a"))
    (tmp_path / "a" / "checkpoints").mkdir()
    other = _run(tmp_path / "a", "lora.rank=8", "optim.lr=1e-5")
    with pytest.raises(FolderInUseError, match=r"lora\.rank: 16 -> 8, optim\.lr: 0.0002 -> 1e-05"):
        _enter(other)
    with pytest.raises(FolderInUseError, match=r"--allow-change optim\.lr"):
        _enter(other, allow_change=["lora.rank"])
    assert folder.read_run(tmp_path / "a").lora.rank == 16
    changed = _enter(other, allow_change=["lora.rank", "optim.lr"])
    assert changed == {"lora.rank": (16, 8), "optim.lr": (2e-4, 1e-5)}
    assert folder.read_run(tmp_path / "a").lora.rank == 8


def test_a_run_that_never_saved_can_be_corrected(tmp_path):
    _enter(_run(tmp_path / "a", "data.train=typo.jsonl"))
    right = _run(tmp_path / "a", "data.train=right.jsonl")
    assert list(_enter(right)) == ["data.train"]
    assert folder.read_run(tmp_path / "a").flat() == right.flat()


def test_two_runs_in_one_folder(tmp_path):
    with (
        folder.hold(tmp_path / "a"),
        pytest.raises(FolderInUseError, match="in use by process"),
        folder.hold(tmp_path / "a"),
    ):
        pass


def test_finished_is_what_the_last_attempt_says(tmp_path):
    end = RunEnd("finished", 1.0, 2, 3, adapter="a")
    start = RunStart("lora", "m", "cpu", 3, 0, 1, 0, {}, 1)
    stopped = RunEnd("stopped by SIGTERM", 1.0, 2, 3)
    assert folder.last_end(tmp_path) is None
    for events, is_finished in [
        ([start], False),
        ([start, end], True),
        ([start, stopped], False),
        ([start, end, start], False),
        ([start, stopped, start, end], True),
    ]:
        (tmp_path / folder.EVENTS_FILE).unlink(missing_ok=True)
        with closing(EventLog(tmp_path / folder.EVENTS_FILE)) as log:
            for event in events:
                log(event)
        assert folder.is_finished(tmp_path) is is_finished
    assert folder.last_end(tmp_path) == end


def test_an_attempt_that_was_refused_takes_nothing_from_a_finished_run(tmp_path):
    end = RunEnd("finished", 1.0, 2, 3, adapter="a")
    start = RunStart("lora", "m", "cpu", 3, 0, 1, 0, {}, 1)
    refused = RunEnd("rows are not there", 0.0, 0, 0)
    with closing(EventLog(tmp_path / folder.EVENTS_FILE)) as log:
        log(refused)
        assert folder.last_end(tmp_path) == refused
        for event in (start, end, refused, refused):
            log(event)
        assert folder.last_end(tmp_path) == end
        log(start)
        assert folder.last_end(tmp_path) is None
        log(refused)
        assert folder.last_end(tmp_path) == refused


def test_without_what_it_wrote_a_run_is_not_finished(tmp_path):
    end = RunEnd("finished", 1.0, 2, 3, adapter="x/a", adapter_sha256={"w.safetensors": ""})
    with closing(EventLog(tmp_path / folder.EVENTS_FILE)) as log:
        log(end)
    assert not folder.is_finished(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "w.safetensors").write_text("")
    assert folder.is_finished(tmp_path)


def test_a_run_without_its_config_is_not_to_be_emptied(tmp_path):
    (tmp_path / "events.jsonl").write_text("")
    (tmp_path / "checkpoints").mkdir()
    with (
        pytest.raises(FolderInUseError, match=r"holds a run whose run.yaml is gone") as error,
        folder.hold(tmp_path),
    ):
        pass
    assert error.value.fix.startswith("bring run.yaml back")


_PLAN = {
    **{"peak_memory_bytes": 1, "uncorrected_peak_memory_bytes": 1, "budget_bytes": 1},
    **{"parts": {}, "device": "cpu", "reasons": [5]},
}


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", "[" * 100_000, '{"device": 1}', '{"reasons": []}', json.dumps(_PLAN)],
)
def test_a_plan_that_says_nothing_is_none(tmp_path, content):
    (tmp_path / folder.PLAN_FILE).write_text(content)
    assert folder.read_plan(tmp_path) == {}


def test_default_folder():
    run = load_config(None, ["model.name=meta/Llama-3", "method=qlora"])
    assert str(folder.folder_of(run)) == "runs/Llama-3-qlora"
