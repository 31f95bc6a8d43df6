"""`nibble eval` on tasks, as a person calls it."""

import json

import pytest

from nibble.commands.main import main


@pytest.fixture
def call(capsys, tiny_model_folder, tmp_path):
    """Exit code, output and messages of an evaluation of these rows."""

    def run(rows, *words):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        folder = str(tiny_model_folder("llama"))
        with pytest.raises(SystemExit) as stop:
            main(["eval", "--model", folder, "--data", str(path), *words])
        return stop.value.code, *capsys.readouterr()

    return run


PAIRS = [{"prompt": f"say {word}", "completion": word} for word in ("one", "two", "three")]
QUESTIONS = [{"question": "q", "choices": ["a", "b"], "answer": n} for n in (0, 1)]


def test_exact_match(call, tmp_path):
    said = tmp_path / "said.jsonl"
    words = ["--task", "exact-match", "--max-new-tokens", "4", "--json", "--limit", "2"]
    code, out, err = call(PAIRS, *words, "--predictions", str(said))
    assert code == 0, err
    values = json.loads(out)
    assert (values["version"], values["num_rows"], values["num_exact"]) == (1, 2, 0)
    assert values["exact_match"]["low"] == 0
    rows = [json.loads(line) for line in said.read_text().splitlines()]
    assert [(row["line"], row["expected"]) for row in rows] == [(1, "one"), (2, "two")]
    assert "exact-match: 2 of 2" in err


def test_multiple_choice(call, tmp_path):
    said = tmp_path / "said.jsonl"
    words = ["--task", "multiple-choice", "--predictions", str(said)]
    code, out, err = call(QUESTIONS, *words, "--json")
    assert code == 0, err
    values = json.loads(out)
    # The same question twice, and each choice is right once.
    assert values["acc"]["value"] == values["acc_norm"]["value"] == values["chance"] == 0.5
    rows = [json.loads(line) for line in said.read_text().splitlines()]
    assert rows[0]["loglikelihoods"] == rows[1]["loglikelihoods"]
    code, out, _ = call(QUESTIONS, *words, "--plain")
    assert "acc                0.5000 (" in out


def test_a_limit_of_the_loss(call):
    all_rows = json.loads(call(PAIRS, "--json")[1])
    first = json.loads(call(PAIRS, "--json", "--limit", "1")[1])
    alone = json.loads(call(PAIRS[:1], "--json")[1])
    assert first == alone != all_rows


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "exact"], "exact-match"),
        (["--plain"], "--task multiple-choice"),
        (["--task", "multiple-choice", "--ignore-case"], "--task exact-match"),
        (["--predictions", "a.jsonl"], "does nothing here"),
        (["--task", "exact-match", "--predictions", "none/a.jsonl"], "no such folder"),
    ],
)
def test_options_that_would_do_nothing_are_refused(call, words, message):
    code, _, err = call(PAIRS, *words)
    assert (code, message in err) == (2, True), err


def test_bad_rows_stop_or_are_left_out(call):
    rows = [QUESTIONS[0], {**QUESTIONS[1], "answer": 2}]
    code, _, err = call(rows, "--task", "multiple-choice")
    assert (code, "rows.jsonl:2" in err, "fix:" in err) == (65, True, True)
    words = ["--task", "multiple-choice", "--set", "data.on_bad_row=skip", "--json"]
    code, out, err = call(rows, *words)
    assert (code, json.loads(out)["num_bad"]) == (0, 1)
    assert "1 bad rows were left out" in err
    code, _, err = call(rows[1:], *words)
    assert (code, "no row is usable" in err) == (65, True)


def test_questions_longer_than_the_context_are_wrong_and_counted(call):
    rows = [QUESTIONS[0], {**QUESTIONS[0], "question": "x" * 300}]
    code, out, err = call(rows, "--task", "multiple-choice", "--json")
    assert (code, json.loads(out)["num_too_long"]) == (0, 1)
    assert "longer than the context" in err
