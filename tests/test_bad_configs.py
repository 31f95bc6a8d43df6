"""A wrong config is refused, with its line and before torch is imported; any other is a run."""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nibble import yamlfile
from nibble.config import RunConfig, check_run, keys, load_config
from nibble.errors import DiskError, UsageError
from nibble.train.folder import run_text

from .config_cases import FILES, OVERRIDES, VALUES

SECONDS = 0.5


def _bytes(text):
    return text if isinstance(text, bytes) else text.encode()


def _write(tmp_path, content):
    path = tmp_path / "bad.yaml"
    path.write_bytes(_bytes(content))
    return path


def _refused(path, overrides=()):
    start = time.process_time()
    with pytest.raises(UsageError) as error:
        check_run(load_config(path, overrides))
    assert time.process_time() - start <= SECONDS
    assert error.value.exit_code == 2
    assert error.value.fix
    assert len(str(error.value)) <= 2000
    return error.value.what


def test_the_table_is_large_and_names_every_key():
    assert len(FILES) + len(OVERRIDES) >= 300
    assert {key for key, _, _ in VALUES} == keys().keys()


@pytest.mark.parametrize(("content", "line", "message"), FILES, ids=range(len(FILES)))
def test_bad_file(tmp_path, content, line, message):
    path = _write(tmp_path, content)
    found = _refused(path)
    assert found.startswith(f"{path}:{line}: ")
    assert message in found


@pytest.mark.parametrize(("overrides", "message"), OVERRIDES, ids=range(len(OVERRIDES)))
def test_bad_override(overrides, message):
    assert message in _refused(None, overrides)


def test_a_flag_over_a_wrong_line_of_a_file(tmp_path):
    path = _write(tmp_path, "lora:\n  rank: 0\n  alpha: 0\n")
    assert load_config(path, ["lora.rank=4", "lora.alpha=1"]).lora.rank == 4
    found = _refused(path, ["lora.rank=-1"])
    assert found.startswith("lora.rank: input should be greater")
    assert f"\n{path}:3: lora.alpha: input should be greater" in found
    assert "x is 3, not a section" in _refused(_write(tmp_path, "x: 3"), ["x.y=1"])


def test_only_the_first_of_many_wrong_keys_are_named(tmp_path):
    path = _write(tmp_path, "".join(f"key_{i}: 1\n" for i in range(2000)))
    assert _refused(path).splitlines()[10:] == ["and 1990 more"]


@pytest.mark.parametrize("size", [yamlfile.MOST_BYTES, 10_000_000])
def test_a_file_that_is_too_large_is_not_parsed(tmp_path, size):
    path = _write(tmp_path, b"out: " + b"x" * size)
    assert _refused(path) == f"{path} has more than 64 KiB, which no config has"


def test_a_file_that_is_none(tmp_path):
    assert _refused(tmp_path / "no.yaml") == f"config file {tmp_path}/no.yaml does not exist"
    assert _refused(tmp_path) == f"config file {tmp_path} is a folder"
    assert "null" in _refused(Path("a\0b"))
    unreadable = _write(tmp_path, "out: a")
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(DiskError, match="cannot read"):
        load_config(loop)
    assert load_config(unreadable).out == "a"


@pytest.fixture(scope="session")
def no_torch(tmp_path_factory):
    """A folder whose torch, transformers and numpy end a process that imports them."""
    folder = tmp_path_factory.mktemp("none")
    for name in ("torch", "transformers", "numpy"):
        (folder / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')")
    return folder


def _nibble(no_torch, *words):
    """The exit code, the messages and the processor seconds of a process of its own."""
    path = os.pathsep.join([str(no_torch), str(Path(__file__).resolve().parents[1])])
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "nibble", *words],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    assert done.stdout == ""
    return done.returncode, done.stderr, seconds


@pytest.mark.torture
def test_the_command_refuses_before_it_imports_torch(no_torch, tmp_path, monkeypatch, is_torture):
    """Processor time, which other work on the machine does not stretch; the least of three."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    slowest = 0.0
    for content, line, message in FILES if is_torture else FILES[:: len(FILES) // 4]:
        path = _write(tmp_path, content)
        results = [_nibble(no_torch, "train", str(path))]
        while results[-1][2] > SECONDS and len(results) < 3:
            results.append(_nibble(no_torch, "train", str(path)))
        code, text, seconds = results[-1]
        assert code == 2, text
        assert text.startswith(f"nibble: {path}:{line}: ")
        assert message in text
        assert "\n  fix: " in text
        assert seconds <= SECONDS, text
        slowest = max(slowest, seconds)
    assert list(work.iterdir()) == []
    print(f"slowest refusal: {slowest:.2f} s of processor time")


@pytest.mark.torture
def test_the_command_refuses_overrides_before_it_imports_torch(no_torch, is_torture):
    cases = [case for case in OVERRIDES if "\0" not in case[0][0]]
    for overrides, message in cases if is_torture else cases[-2:]:
        words = [word for override in overrides for word in ("--set", override)]
        code, text, _ = _nibble(no_torch, "train", *words)
        assert (code, message in text) == (2, True), text


def test_a_flag_that_looks_like_a_number_is_text(no_torch):
    code, text, _ = _nibble(no_torch, "train", "--model", "7", "--out", "2024")
    assert (code, "data.train is not set" in text) == (2, True), text


_MARKS = "- : [ ] { } , &a *a !!str ! | > ' \" # --- ... % @ << ? ~ \\ud800 \\0 1 010 .nan 1e999"
_BLANKS = [" ", "  ", "\n", "\n  ", "\t", "\r", ": ", "- ", ", ", "\x85", "\u2028", "\ufeff"]
_LAST = [name.rpartition(".")[2] for name in keys()]
_WORDS = st.sampled_from(
    ["model", "optim", "true", *keys(), *_LAST, *_MARKS.split(), *_BLANKS, "é", "😀"]
)
_TEXTS = st.one_of(st.text(), st.lists(_WORDS).map("".join))
_VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9))


@st.composite
def _almost_right(draw):
    """A config that is right but for what is drawn for a few of its keys."""
    flat = dict(RunConfig().flat())
    flat.update(draw(st.dictionaries(st.sampled_from(sorted(flat)), _VALUES, max_size=4)))
    nested = {}
    for key, value in flat.items():
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    return json.dumps(nested, indent=draw(st.sampled_from([None, 2])))


def _read(path, overrides=()):
    """A config is refused with an error of ours, or is a run whose file gives the same again."""
    try:
        run = load_config(path, overrides)
    except UsageError:
        return
    with tempfile.TemporaryDirectory() as folder:
        again = Path(folder) / "run.yaml"
        again.write_text(run_text(run))
        assert load_config(again).flat() == run.flat()


@pytest.mark.torture
@given(st.one_of(st.binary(), st.one_of(_TEXTS, _almost_right()).map(_bytes)))
def test_any_file_is_a_run_or_refused(content):
    with tempfile.NamedTemporaryFile(suffix=".yaml") as file:
        file.write(content)
        file.flush()
        _read(Path(file.name))


@pytest.mark.torture
@given(st.lists(st.one_of(_TEXTS, st.builds("{}={}".format, _WORDS, _TEXTS)), max_size=4))
def test_any_overrides_are_a_run_or_refused(overrides):
    _read(None, overrides)
