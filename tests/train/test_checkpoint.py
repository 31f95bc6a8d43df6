"""A checkpoint is complete or it is not there, and what is damaged is never taken for whole."""

import json
import random
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nibble.disk import faults_at
from nibble.errors import DiskError, FolderInUseError, NonFiniteError
from nibble.train.checkpoint import (
    MANIFEST_FILE,
    NUM_KEPT,
    STATE_FILE,
    Damaged,
    TrainState,
    check_room,
    latest,
    most_at_once,
    restore,
    save,
    validate,
)
from nibble.train.optimizer import AdamW, ParameterGroup


def _joined(pieces):
    return {name: torch.cat(parts) for name, parts in pieces.items()}


def _optimizer(value=1.0):
    return AdamW([ParameterGroup((nn.Parameter(torch.full((4,), value)),))])


def _save(folder, step, value=1.0, resumed_from=None, **state):
    state = TrainState(step, **state)
    return save(folder, state, _optimizer(value), identity={"x": "y"}, resumed_from=resumed_from)


def _steps(folder):
    return sorted(int(path.name.removeprefix("step-")) for path in folder.iterdir())


def _latest_step(folder):
    found, _ = latest(folder)
    return found.state.step


def test_round_trip_with_random_state(tmp_path):
    state = TrainState(5, 100, 1.5, 4, eval_loss=2.0, best_eval_loss=2.0, is_eval_due=True)
    torch.manual_seed(3)
    save(tmp_path, state, _optimizer(2.0), identity={"data": "abc"})
    drawn = torch.rand(2)
    other = _optimizer()
    found, damages = latest(tmp_path)
    assert (found.identity, damages) == ({"data": "abc"}, [])
    assert restore(found, other) == state
    assert torch.equal(torch.rand(2), drawn)
    assert torch.equal(_joined(other.state_pieces())["group0.value"], torch.full((4,), 2.0))


def _advance(optimizer, first, last):
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        (parameter,) = optimizer.groups[0].parameters
        parameter.grad.copy_(torch.randn(1300, generator=generator))
        optimizer.step(0.01)
    return optimizer


def _wide_optimizer(bits, is_paged):
    parameter = nn.Parameter(torch.linspace(-1, 1, 1300))
    pages = {"is_paged": is_paged, "page_bytes": 65 * bits}
    return AdamW([ParameterGroup((parameter,))], bits=bits, **pages)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("is_paged", [False, True])
def test_restored_and_continued_equals_uninterrupted(tmp_path, bits, is_paged):
    whole = _advance(_wide_optimizer(bits, is_paged), 0, 10)
    half = _advance(_wide_optimizer(bits, is_paged), 0, 5)
    save(tmp_path, TrainState(5), half, identity={})
    other = _wide_optimizer(bits, is_paged)
    restore(latest(tmp_path)[0], other)
    state, expected = _joined(_advance(other, 5, 10).state_pieces()), _joined(whole.state_pieces())
    assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("bits", "others"), [(32, 8), (8, 32)])
def test_moments_of_another_number_of_bits_are_converted(tmp_path, bits, others):
    saved = _advance(_wide_optimizer(bits, False), 0, 5)
    save(tmp_path, TrainState(5), saved, identity={})
    other = _wide_optimizer(others, True)
    restore(latest(tmp_path)[0], other)
    values = [_advance(optimizer, 5, 6).groups[0].parameters[0] for optimizer in (saved, other)]
    torch.testing.assert_close(*values, rtol=0, atol=2e-3)


def test_the_newest_the_best_and_the_one_resumed_from_are_kept(tmp_path):
    for step in range(1, 9):
        loss = {2: 1.5, 4: 1.0, 6: 1.2}.get(step)
        _save(tmp_path, step, eval_loss=loss, resumed_from=3)
    assert _steps(tmp_path) == [3, 4, 7, 8]
    assert NUM_KEPT == 2


def test_a_copy_under_another_name_is_left_alone(tmp_path):
    shutil.copytree(_save(tmp_path / "checkpoints", 1), tmp_path / "checkpoints/step-00000001-mine")
    for step in (2, 3, 4):
        _save(tmp_path / "checkpoints", step)
    assert (tmp_path / "checkpoints/step-00000001-mine" / STATE_FILE).is_file()
    assert _latest_step(tmp_path / "checkpoints") == 4


def test_what_comes_after_the_one_resumed_from_is_dropped(tmp_path):
    """It was damaged, or it would have been resumed from."""
    for step in (1, 2, 3):
        _save(tmp_path, step)
    (tmp_path / "step-00000003" / STATE_FILE).write_bytes(b"")
    _save(tmp_path, 2, resumed_from=1)
    assert _steps(tmp_path) == [2]


def test_no_value_that_is_not_a_number_is_saved(tmp_path):
    for value in (float("nan"), float("inf")):
        with pytest.raises(NonFiniteError, match=r"group0\.value holds NaN"):
            _save(tmp_path, 3, value)
    assert list(tmp_path.iterdir()) == []


def test_all_damaged_is_an_error_and_none_is_none(tmp_path):
    assert latest(tmp_path / "none") == latest(tmp_path) == (None, [])
    (_save(tmp_path, 1) / MANIFEST_FILE).unlink()
    with pytest.raises(DiskError, match=r"step-00000001.manifest\.json is missing"):
        latest(tmp_path)


def test_other_values_than_those_trained(tmp_path):
    _save(tmp_path, 1)
    other = AdamW([ParameterGroup((nn.Parameter(torch.zeros(5)),))])
    with pytest.raises(FolderInUseError, match=r"exp_avg is float32 of \[4\], expected float32 of"):
        restore(latest(tmp_path)[0], other)


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="cannot write the checkpoint"):
        _save(tmp_path / "file", 1)


def test_room_for_those_that_stand_at_once(tmp_path, monkeypatch):
    """Of four values and their moments: 48 bytes each."""
    optimizer, folder = _optimizer(), tmp_path / "checkpoints"
    check_room(folder, optimizer, has_eval=True)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=143))
    with pytest.raises(DiskError, match="has 143 B free, and 3 checkpoints take 144 B"):
        check_room(folder, optimizer, has_eval=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=191))
    with pytest.raises(DiskError, match="has 191 B free, and 4 checkpoints take 192 B"):
        check_room(folder, optimizer, has_eval=True)
    check_room(folder, optimizer, has_eval=False)


def test_room_beside_the_one_that_is_resumed_from(tmp_path, monkeypatch):
    """What stands is room, and the one resumed from stays beside the others."""
    optimizer, folder = _optimizer(), tmp_path / "checkpoints"
    for step in (1, 2):
        _save(folder, step)
    held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    usage = shutil.disk_usage(tmp_path)
    for free, has_room in ((5 * 48 - held, True), (5 * 48 - held - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=free))  # noqa: B023
        if has_room:
            check_room(folder, optimizer, has_eval=True)
        else:
            with pytest.raises(DiskError, match="and 5 checkpoints take 240 B"):
                check_room(folder, optimizer, has_eval=True)


def test_as_many_stand_as_there_was_room_for(tmp_path):
    """Two newest, the best, the one resumed from, and the one being written."""
    seen = []
    with faults_at(lambda name, *paths: seen.append(len([*tmp_path.glob("*step-*")]))):
        for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 2.5), (5, 2.6), (6, 2.7)):
            state = TrainState(step, eval_loss=loss, best_eval_loss=min(loss, 1.0))
            save(tmp_path, state, _optimizer(), identity={}, resumed_from=1)
    assert max(seen) == most_at_once(has_eval=True, is_resumed=True) == 5


def test_the_clock_and_the_times_of_files_do_not_count(tmp_path):
    import os

    for step, time in ((1, 2e9), (2, 1e9), (3, 0)):
        path = _save(tmp_path, step)
        for file in (path, *path.iterdir()):
            os.utime(file, (time, time))
    assert _latest_step(tmp_path) == 3


# Every mutation is found, whatever the place.


def _flip(content, rng, other):
    place = rng.randrange(len(content))
    changed = bytearray(content)
    changed[place] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _truncate(content, rng, other):
    return content[: rng.randrange(len(content))]


def _append(content, rng, other):
    return content + rng.randbytes(rng.randrange(1, 50))


def _swap(content, rng, other):
    return other


def _exchange(content, rng, other):
    """Two stretches of the file change places."""
    size = rng.randrange(1, len(content) // 2)
    return content[-size:] + content[size:-size] + content[:size]


def _zeros(content, rng, other):
    start = rng.randrange(len(content))
    return content[:start] + bytes(len(content) - start)


MUTATIONS = (_flip, _flip, _flip, _truncate, _append, _swap, _exchange, _zeros)


@pytest.mark.torture
def test_every_mutation_is_found_and_named(tmp_path, is_torture):
    """The one before is used, and the text says which file it is."""
    rng = random.Random(0)
    for step in (1, 2):
        optimizer = _advance(_wide_optimizer(32, False), 0, 2 * step)
        save(tmp_path, TrainState(step, tokens=10 * step), optimizer, identity={"data": "x"})
    folder = tmp_path / "step-00000002"
    whole = {name: (folder / name).read_bytes() for name in (STATE_FILE, MANIFEST_FILE)}
    stale = {name: (tmp_path / "step-00000001" / name).read_bytes() for name in whole}
    num_mutations, num_found = 10_000 if is_torture else 600, 0
    while num_found < num_mutations:
        name = rng.choice([STATE_FILE, MANIFEST_FILE])
        mutation = MUTATIONS[num_found % len(MUTATIONS)]
        mutated = mutation(whole[name], rng, stale[name])
        if mutated == whole[name]:
            continue
        (folder / name).write_bytes(mutated)
        found, damages = latest(tmp_path)
        assert found.state.step == 1, mutation.__name__
        assert len(damages) == 1
        assert str(folder / name) in damages[0]
        num_found += 1
        (folder / name).write_bytes(whole[name])
    print(f"mutations of checkpoint files found: {num_found} of {num_mutations}")
    assert _latest_step(tmp_path) == 2


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "extra.txt").write_text("x"),
        lambda folder: (folder / STATE_FILE).unlink(),
        lambda folder: (folder / MANIFEST_FILE).unlink(),
        lambda folder: folder.rename(folder.with_name("step-00000009")),
        lambda folder: (folder / STATE_FILE).rename(folder.parent / "moved"),
    ],
)
def test_a_folder_with_other_names_is_damaged(tmp_path, spoil):
    for step in (1, 2):
        _save(tmp_path, step)
    spoil(tmp_path / "step-00000002")
    assert _latest_step(tmp_path) == 1


@pytest.mark.parametrize("name", [STATE_FILE, MANIFEST_FILE])
def test_links_are_not_followed(tmp_path, name):
    for step in (1, 2):
        _save(tmp_path / "checkpoints", step)
    file = tmp_path / "checkpoints" / "step-00000002" / name
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    assert _latest_step(tmp_path / "checkpoints") == 1


@pytest.fixture(scope="session")
def whole_manifest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("manifest")
    path = _save(folder, 1)
    return path, json.loads((path / MANIFEST_FILE).read_bytes())


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


@pytest.mark.torture
@given(content=st.binary(max_size=200) | _JSON.map(lambda value: json.dumps(value).encode()))
def test_any_manifest_is_read_or_damaged(whole_manifest, content):
    path, _ = whole_manifest
    before = (path / MANIFEST_FILE).read_bytes()
    (path / MANIFEST_FILE).write_bytes(content)
    try:
        with pytest.raises(Damaged):
            validate(path)
    finally:
        (path / MANIFEST_FILE).write_bytes(before)


@pytest.mark.torture
@given(data=st.data())
def test_a_manifest_with_a_right_digest_and_wrong_values_is_damaged(whole_manifest, data):
    """As somebody would write it who knows the form; what it names is checked all the same."""
    from nibble.train.checkpoint import _bytes_of

    path, manifest = whole_manifest
    before = (path / MANIFEST_FILE).read_bytes()
    changed = {name: value for name, value in manifest.items() if name != "manifest_sha256"}
    name = data.draw(st.sampled_from(sorted(changed)))
    changed[name] = data.draw(_JSON.filter(lambda value: value != changed[name]))
    (path / MANIFEST_FILE).write_bytes(_bytes_of(changed))
    try:
        found = validate(path)
    except Damaged:
        return
    finally:
        (path / MANIFEST_FILE).write_bytes(before)
    assert name in ("state", "num_optimizer_steps", "identity")
    assert (type(found.state.step), found.state.step) == (int, 1)
