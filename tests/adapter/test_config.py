"""An adapter is given by its folder or by that of its run."""

import pytest

from nibble.adapter.config import adapter_folder, read_adapter_config
from nibble.adapter.format import read_base_options, write_adapter
from nibble.errors import AdapterError
from nibble.model.adapt import adapt
from nibble.model.load import load_base


@pytest.fixture(scope="module")
def run(tiny_model_folder, tmp_path_factory):
    model, _ = load_base(str(tiny_model_folder("llama")), "nf4")
    adapt(model, rank=3, alpha=5)
    place = tmp_path_factory.mktemp("run")
    write_adapter(model, place / "adapter")
    return place


def test_the_folder_of_a_run_stands_for_its_adapter(run):
    assert adapter_folder(run) == adapter_folder(run / "adapter") == run / "adapter"
    assert read_adapter_config(run) == read_adapter_config(run / "adapter")
    assert read_adapter_config(run).rank == 3
    assert read_base_options(run)["storage"] == "nf4"


def test_a_folder_without_an_adapter_is_itself(tmp_path):
    (tmp_path / "adapter").mkdir()
    assert adapter_folder(tmp_path) == tmp_path
    with pytest.raises(AdapterError, match=r"holds no adapter_config\.json"):
        read_adapter_config(tmp_path)
    with pytest.raises(AdapterError, match="there is no adapter folder"):
        read_adapter_config(tmp_path / "none")
