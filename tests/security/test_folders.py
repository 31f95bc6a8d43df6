"""Folders that lie, are broken, or want to run code: nothing of theirs is run or followed.

Each is used under an audit hook, in one process; `audited.py` says what it watches.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
EXIT_CODES = {"ModelError": 65, "AdapterError": 65, "DataError": 65, "DiskError": 74, "": 0}
MOST_BYTES = 512 << 20
MOST_SECONDS = 5


def _cases():
    sys.path.insert(0, str(HERE))
    try:
        import model_cases
        import other_cases
    finally:
        sys.path.remove(str(HERE))
    return {**model_cases.CASES, **other_cases.CASES}


CASES = _cases()


@pytest.fixture(scope="module")
def results(tiny_model_folder, tmp_path_factory):
    work = tmp_path_factory.mktemp("spoilt")
    # Without this the hub would not be asked, and the test would not see that it is.
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    environment |= {"PYTHONPATH": str(HERE.parents[1]), "XDG_CACHE_HOME": str(work / "cache")}
    environment["NIBBLE_NO_COMPILE"] = "1"
    done = subprocess.run(
        [sys.executable, HERE / "audited.py", tiny_model_folder("llama"), work],
        capture_output=True, text=True, cwd=work, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_there_are_enough():
    assert len(CASES) >= 80


@pytest.mark.parametrize("name", CASES)
def test_folder(name, results):
    case, result = CASES[name], results[name]
    assert result["error"] == case.error, result
    assert result["exit_code"] == EXIT_CODES[case.error]
    assert case.says in result["text"]
    assert bool(result["fix"]) == bool(case.error), result
    assert not result["seen"]
    assert not result["pwned"]
    assert case.use == "truncations" or result["seconds"] < MOST_SECONDS
    assert result["grown_bytes"] <= MOST_BYTES
