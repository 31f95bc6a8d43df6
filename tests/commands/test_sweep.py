"""`nibble sweep` as a person uses it."""

import json
import sys
from pathlib import Path

import pytest

from nibble.commands.main import main
from nibble.experiment import engine

STUB = Path(__file__).parents[1] / "experiment" / "stub_run.py"


@pytest.fixture
def recipe(tiny_model_folder, tmp_path):
    rows = [{"prompt": f"say {n}", "completion": f"{n}"} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"method: lora\nmodel: {{name: {tiny_model_folder('llama')}}}\n"
        f"data: {{train: {tmp_path / 'rows.jsonl'}, eval: 0.2, max_seq_len: 64}}\n"
        "train: {steps: 4, batch_size: 4, micro_batch_size: 2, recompute: none}\n"
        "optim: {paged: false}\n"
    )
    return path


@pytest.fixture
def stubs(monkeypatch):
    monkeypatch.setattr(engine, "TRAIN", (sys.executable, str(STUB), "train"))


def _call(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main(["sweep", *map(str, words)])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return stop.value.code, out, err


def test_a_sweep_prints_its_table_and_goes_on(capsys, recipe, tmp_path, stubs):
    """Runs are stubs; a second call has nothing to do and says the same."""
    words = (recipe, "--grid", "optim.lr=0.01,0.02", "lora.rank=4,8", "--out", tmp_path / "out")
    code, text, err = _call(capsys, *words)
    assert code == 0, err
    assert "run-1 running on CPU: optim.lr=0.01 lora.rank=4" in err
    assert "run-4 finished: loss" in err
    assert "held-out loss" in text
    best = text.split("best     ")[1].split()[0]
    assert f"adapter  {tmp_path}/out/{best}/adapter" in text
    assert best in ("run-3", "run-4")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (tmp_path / "out" / "sweep.csv").read_text().count("\n") == 5
    code, text, err = _call(capsys, *words, "--json")
    assert (code, "running" in err) == (0, False)
    again = json.loads(text)
    assert again["version"] == 1
    assert again["winner"] == report["winner"]
    for more in ("lora.rank=4,16", "lora.rank=4,8,16"):
        words = (recipe, "--grid", "optim.lr=0.01,0.02", more, "--out", tmp_path / "out")
        code, _, err = _call(capsys, *words)
        assert (code, "holds another sweep" in err) == (73, True)


def test_a_run_that_does_not_fit_is_a_row(capsys, recipe, tmp_path, stubs, monkeypatch):
    for home in ("nibble.train.memory", "nibble.plan.plan"):
        monkeypatch.setattr(f"{home}.available_bytes", lambda device: 150_000_000)
    monkeypatch.setattr("nibble.experiment.forecasts.PROCESS_BYTES", 0)
    words = ("--grid", "lora.rank=4,4096", "--out", tmp_path / "out")
    code, text, err = _call(capsys, recipe, *words)
    assert code == 0, err
    assert "does not fit: nothing fits: lora" in " ".join(text.split())
    assert "best     run-1" in text


def test_halving_and_a_list_of_runs(capsys, recipe, tmp_path, stubs):
    (tmp_path / "runs.yaml").write_text("- optim.lr: 0.01\n- {optim.lr: 0.02, lora.rank: 8}\n")
    words = (recipe, "--runs", tmp_path / "runs.yaml", "--out", tmp_path / "out", "--halving")
    code, text, err = _call(capsys, *words, "--set", "train.steps=8")
    assert code == 0, err
    assert "stopped early: the better half went on at step 2" in " ".join(text.split())
    assert "best     run-2" in text


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--grid", "lora.rank=4,8"), 2, "--out is missing"),
        (("--out", "o"), 2, "nothing to sweep over"),
        (("--out", "o", "--grid", "lora.rank=4,8", "--runs", "r"), 2, "exclude each other"),
        (("--out", "o", "--grid", "lora.rnk=4,8"), 2, 'did you mean "lora.rank"'),
        (("--out", "o", "--grid", "lora.rank=4,x"), 2, "lora.rank"),
        (("--out", "o", "--grid", "out=a,b"), 2, "the sweep decides"),
        (("--out", "o", "--grid", "lora.rank=4,4"), 2, "the same run"),
        (("--out", "o", "--grid", "lora.rank=4,8", "--on", "rya"), 2, 'did you mean "ray"'),
        (("--out", "o", "--grid", "lora.rank=4,8", "--workers", "0"), 2, "workers"),
        (("--out", "o", "--runs", "none.yaml"), 2, "does not exist"),
        (("--out", "o", "--grid", "train.steps=4,8", "--halving"), 2, "the same train.steps"),
        (("--out", "full", "--grid", "lora.rank=4,8"), 73, "thesis.txt"),
    ],
)
def test_wrong_words_are_refused_before_anything_starts(
    capsys, recipe, tmp_path, monkeypatch, words, code, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: pytest.fail("started"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    found, text, err = _call(capsys, recipe, *words)
    assert (found, text, message in err) == (code, "", True), err
    assert not (tmp_path / "o").exists()
