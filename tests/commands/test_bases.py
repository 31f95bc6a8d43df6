"""The base that adapters were trained on is the one they are used with."""

import pytest

from nibble.adapter.format import write_adapter
from nibble.commands.bases import base_options
from nibble.errors import AdapterError, UsageError
from nibble.model.adapt import adapt
from nibble.model.load import load_base


@pytest.fixture
def adapter(tiny_model_folder, tmp_path):
    """Writes an adapter of a base in this storage."""

    def write(storage, **options):
        model, _ = load_base(str(tiny_model_folder("llama")), storage, **options)
        adapt(model, rank=2)
        place = tmp_path / f"{storage}-{len(list(tmp_path.iterdir()))}"
        return write_adapter(model, place)

    return write


def test_the_adapters_decide(adapter):
    assert base_options("", [adapter("bf16")])["storage"] == "bf16"
    options = base_options("", [adapter("nf4", quant={"block_size": 32})])
    assert (options["storage"], options["quant"]["block_size"]) == ("nf4", 32)
    assert base_options("", [adapter("nf4"), adapter("nf4")])["storage"] == "nf4"


def test_the_method_goes_before_them(adapter):
    assert base_options("lora", [adapter("nf4"), adapter("bf16")]) == {"storage": "bf16"}
    assert base_options("qlora", []) == {"storage": "nf4"}


def test_nobody_says_anything():
    assert base_options("", []) == {"storage": "bf16"}


def test_adapters_of_different_bases(adapter):
    with pytest.raises(UsageError, match=r"trained on bf16, .* on nf4 \(block_size 64"):
        base_options("", [adapter("bf16"), adapter("nf4")])


def test_wrong_arguments(tmp_path):
    with pytest.raises(UsageError, match="expected lora or qlora"):
        base_options("full", [])
    with pytest.raises(AdapterError):
        base_options("", [tmp_path / "none"])
