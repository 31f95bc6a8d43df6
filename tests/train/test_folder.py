"""Whose folder it is."""

import pytest

from nibble.config import load_config
from nibble.errors import FolderInUseError
from nibble.train import folder


def _run(path, *more):
    return load_config(None, [f"out={path}", "model.name=m", *more])


def test_run_file_is_a_recipe_with_origins(tmp_path):
    run = _run(tmp_path / "a", "optim.lr=1e-5", "lora.target=[q_proj, v_proj]")
    run = run.with_values({"method": "lora"}, "planner")
    with folder.run_folder(run) as out:
        pass
    assert "  lr: 1e-05  # flag" in (out / "run.yaml").read_text()
    read = folder.read_run(out)
    assert read.flat() == run.flat()
    assert (read.origin("method"), read.origin("lora.rank")) == ("planner", "default")
    assert load_config(out / "run.yaml").flat() == run.flat()


def test_something_else_in_the_folder(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with (
        pytest.raises(FolderInUseError, match=r"holds something else \(thesis.txt\)"),
        folder.run_folder(_run(tmp_path)),
    ):
        pass
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_another_config_in_the_folder(tmp_path):
    with folder.run_folder(_run(tmp_path / "a")) as out:
        (out / "checkpoints").mkdir()
    with (
        pytest.raises(FolderInUseError, match=r"lora\.rank: 16 -> 8"),
        folder.run_folder(_run(tmp_path / "a", "lora.rank=8")),
    ):
        pass


def test_a_run_that_never_saved_can_be_corrected(tmp_path):
    with folder.run_folder(_run(tmp_path / "a", "data.train=typo.jsonl")):
        pass
    right = _run(tmp_path / "a", "data.train=right.jsonl")
    with folder.run_folder(right) as out:
        assert folder.read_run(out).flat() == right.flat()


def test_two_runs_in_one_folder(tmp_path):
    run = _run(tmp_path / "a")
    with (
        folder.run_folder(run),
        pytest.raises(FolderInUseError, match="in use by process"),
        folder.run_folder(run),
    ):
        pass


def test_default_folder():
    run = load_config(None, ["model.name=meta/Llama-3", "method=qlora"])
    assert str(folder.folder_of(run)) == "runs/Llama-3-qlora"


def test_metrics_of_repeated_steps_are_dropped(tmp_path):
    header = ",".join(folder.METRICS_COLUMNS)
    (tmp_path / "metrics.csv").write_text(f"{header}\n0,,,,,,,3\n1,2,,,,,,\n2,1,,,,,,\n")
    folder.forget_metrics_after(tmp_path, 1)
    assert (tmp_path / "metrics.csv").read_text() == f"{header}\n0,,,,,,,3\n1,2,,,,,,\n"
