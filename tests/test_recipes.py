"""Every recipe: its keys, the command at its top, and two steps of it."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import nibble
from nibble.config import RunConfig, check_run, flatten, load_config, unused_keys
from nibble.experiment.compare import METHODS, read_comparison
from nibble.yamlfile import read

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
# What a user replaces; everything else says why it is as it is.
REPLACED = ("model.name", "data.train", "data.eval")


@pytest.fixture(params=RECIPES, ids=lambda path: path.stem)
def recipe(request):
    return request.param


def command_of(recipe):
    """The words of the command that the head of a recipe tells."""
    (line,) = [line for line in recipe.read_text().splitlines() if "nibble compare" in line[:20]]
    return shlex.split(line.removeprefix("#"))


def test_there_is_one_for_each_domain():
    names = [path.stem for path in RECIPES]
    assert names == ["biomedical", "code", "customer", "legal", "maths"]


def test_every_key_says_something(recipe):
    values, lines = read(recipe)
    text, defaults = recipe.read_text().splitlines(), RunConfig().flat()
    for key, value in flatten(values).items():
        has_reason = " # " in text[lines[key] - 1]
        assert value != defaults[key], f"{key} is the default"
        assert has_reason or key in REPLACED, f"{key} has no reason"


def test_a_run_can_be_made_of_it(recipe):
    run = load_config(recipe)
    check_run(run)
    assert unused_keys(run) == []


def test_the_command_at_its_top_compares_three_methods(recipe):
    program, verb, path, *flags = command_of(recipe)
    assert (program, verb, ROOT / path) == ("nibble", "compare", recipe)
    assert flags[0::2] == ["--set", "--out"]
    comparison = read_comparison(recipe, [flags[1]])
    assert tuple(comparison.runs) == METHODS
    rates = {method: run.optim.lr for method, run in comparison.runs.items()}
    assert rates == {"lora": 4e-3, "qlora": 4e-3, "full": 3e-4}


def test_pages_of_domains_say_what_their_reports_say():
    command = [sys.executable, "benchmarks/domains.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in (ROOT / "docs" / "domains").glob("*.md"):
        for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_it_trains(recipe, shared, tmp_path):
    run = load_config(recipe)
    few = {}
    for key, path in (("data.train", run.data.train), ("data.eval", run.data.eval)):
        lines = (ROOT / path).read_text(encoding="utf-8").splitlines()[:8]
        few[key] = str(tmp_path / f"{key}.jsonl")
        Path(few[key]).write_text("\n".join(lines) + "\n", encoding="utf-8")
    base = str(shared / "models" / "base-16m")
    short = {
        "model.name": base,
        "train.steps": 2,
        "train.batch_size": 2,
        "out": str(tmp_path / "out"),
    }
    result = nibble.train(run.with_values({**few, **short}, "flag"))
    assert result.eval_loss is not None
    assert 0 < result.eval_loss < 20
    assert (tmp_path / "out" / "adapter" / "adapter_config.json").is_file()
