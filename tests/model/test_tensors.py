"""Reading single tensors out of safetensors files."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from nibble.errors import DiskError, ModelError
from nibble.model.tensors import (
    Entry,
    Spec,
    TensorReader,
    check_finite,
    read_entries,
    read_metadata,
    tensor_file,
    write_tensors,
)

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn,
)  # fmt: skip


def write_header(path, header, values=b""):
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(content).to_bytes(8, "little") + content + values)
    return path


def test_every_dtype_and_shape(tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = {str(d): (torch.rand(3, 5) * 4).to(d) for d in DTYPES}
    tensors |= {
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 4),
        "cube": torch.rand(2, 3, 4),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    entries = read_entries(path)
    assert set(entries) == set(tensors)
    reader = TensorReader(entries.values())
    for name, tensor in tensors.items():
        for read in (reader.read, reader.borrow):
            value = read(entries[name])
            assert value.dtype == tensor.dtype
            assert value.shape == tensor.shape
            assert bytes(value.flatten().view(torch.uint8)) == bytes(
                tensor.flatten().view(torch.uint8)
            )


def test_borrowed_tensors_share_one_buffer_and_read_ones_do_not(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(4), "b": torch.zeros(2)}, path)
    entries = read_entries(path)
    reader = TensorReader(entries.values())
    kept, borrowed = reader.read(entries["a"]), reader.borrow(entries["a"])
    other = reader.borrow(entries["b"])
    assert borrowed.data_ptr() == other.data_ptr()
    assert torch.equal(kept, torch.ones(4))
    assert kept.untyped_storage().nbytes() == 16


BROKEN_HEADERS = {
    "no object": ([], "expected an object"),
    "no JSON": (b"{'a'", "broken header"),
    "unknown dtype": (
        {"a": {"dtype": "F4", "shape": [1], "data_offsets": [0, 1]}},
        "entry for 'a'",
    ),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, "entry for 'a'"),
    "sizes differ": ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "do not agree"),
    "negative": ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}, "do not agree"),
    "outside": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}, "do not agree"),
    "text for an offset": (
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": ["0", 4]}},
        "entry for 'a'",
    ),
    "infinite size": (
        {"a": {"dtype": "F32", "shape": [float("inf")], "data_offsets": [0, 4]}},
        "broken header: it has the value Infinity",
    ),
    "broken size": (
        {"a": {"dtype": "F32", "shape": [1.5], "data_offsets": [0, 4]}},
        "entry for 'a'",
    ),
    "a key twice": (b'{"a": 1, "a": 1}', "has the key 'a' twice"),
    "more dimensions than any tensor": (
        {"a": {"dtype": "F32", "shape": [1] * 17, "data_offsets": [0, 4]}},
        "entry for 'a'",
    ),
    "a longer dimension than any tensor": (
        {"a": {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}},
        "entry for 'a'",
    ),
    "too long": (b" " * 16_000_001, "larger than 16,000,000 bytes"),
    "too deep": (b"[" * 100_000, "broken header"),
    "cut off": ({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}, "is cut off"),
}


@pytest.mark.parametrize(
    ("first", "size", "fragment"),
    [(0, 8, "overlap or leave gaps"), (8, 12, "overlap or leave gaps"), (4, 12, "4 bytes more")],
)
def test_values_follow_one_another_to_the_end(first, size, fragment, tmp_path):
    header = {
        "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        "b": {"dtype": "F32", "shape": [1], "data_offsets": [first, first + 4]},
    }
    if first == 0:
        header["c"] = {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}
    path = write_header(tmp_path / "model.safetensors", header, bytes(size))
    with pytest.raises(ModelError, match=fragment):
        read_entries(path)


@pytest.mark.parametrize("case", BROKEN_HEADERS)
def test_broken_header(case, tmp_path):
    header, fragment = BROKEN_HEADERS[case]
    path = write_header(tmp_path / "model.safetensors", header)
    with pytest.raises(ModelError, match=fragment):
        read_entries(path)


@pytest.mark.parametrize("content", [b"", b"1234567", (10**15).to_bytes(8, "little") + b"{}"])
def test_too_short(content, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="cut off or is no safetensors file"):
        read_entries(path)


def test_file_that_vanishes_or_shrinks(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(100)}, path)
    entry = read_entries(path)["a"]
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ModelError, match="cut off in 'a'"):
        TensorReader([entry]).read(entry)
    path.unlink()
    with pytest.raises(DiskError, match="cannot be read"):
        TensorReader([entry]).read(entry)
    with pytest.raises(DiskError, match="cannot be read"):
        read_entries(path)


def test_size_of_an_entry(tmp_path):
    assert Entry(tmp_path, "a", torch.bfloat16, (3, 5), 0).num_bytes == 30


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_check_finite(dtype, value):
    tensor = torch.zeros(3, 1001, dtype=dtype)
    check_finite("w", tensor)
    tensor[2, 17] = value
    with pytest.raises(ModelError, match="the weight w holds NaN"):
        check_finite("w", tensor)


def test_check_finite_leaves_the_rest_alone():
    check_finite("w", torch.zeros(0))
    check_finite("w", torch.ones(3, dtype=torch.int64))


def test_a_file_is_filled_in_any_order_and_in_pieces(tmp_path):
    values = {"a": torch.arange(6.0).view(3, 2), "b": torch.arange(5, dtype=torch.uint8)}
    specs = {name: Spec(value.dtype, tuple(value.shape)) for name, value in values.items()}
    path = tmp_path / "w.safetensors"
    with tensor_file(path, specs, {"format": "pt", "mine": "yes"}) as write:
        write("b", values["b"].split(2))
        write("a", values["a"].split(1))
    found = load_file(path)
    assert all(torch.equal(found[name], value) for name, value in values.items())
    assert read_metadata(path) == {"format": "pt", "mine": "yes"}


@pytest.mark.parametrize(
    "pieces", [None, [torch.zeros(1, 2)], [torch.zeros(4, 2)], [torch.zeros(3, 2).bfloat16()]]
)
def test_a_file_that_is_not_filled_is_an_error(tmp_path, pieces):
    def fill():
        with tensor_file(tmp_path / "w", {"a": Spec(torch.float32, (3, 2))}) as write:
            if pieces is not None:
                write("a", pieces)

    with pytest.raises(ValueError, match=r"a: |nothing was written"):
        fill()


def test_rows_of_an_entry(tmp_path):
    value = torch.arange(24.0).view(2, 3, 4)
    write_tensors(tmp_path / "w", {"a": [value]})
    entry = read_entries(tmp_path / "w")["a"]
    assert torch.equal(TensorReader([]).read(entry.rows(1, 5)), value.view(6, 4)[1:5])
