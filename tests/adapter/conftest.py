"""GGUF files read back, tiny models that llama.cpp reads too, adapters with an effect."""

import json
import shutil

import numpy as np
import pytest
import torch

from nibble.adapter.format import write_adapter
from nibble.adapter.vocabulary import Vocabulary
from nibble.model.adapt import adapt
from nibble.model.experts import Experts
from nibble.model.load import load_base
from nibble.model.lora import LoRALinear


class Gguf:
    """A file as the gguf package reads it: `keys`, and `tensors` in the type they are stored in."""

    def __init__(self, path):
        reader = pytest.importorskip("gguf").GGUFReader(path)
        self.keys = {k: f.contents() for k, f in reader.fields.items() if k[:5] != "GGUF."}
        self.types = {t.name: t.tensor_type.name for t in reader.tensors}
        self.tensors = {t.name: _to_torch(t) for t in reader.tensors}

    def vocabulary(self):
        """The tokenizer, from the fields alone."""
        found = {k.removeprefix("tokenizer.ggml."): v for k, v in self.keys.items()}
        special = {k[: -len("_token_id")]: v for k, v in found.items() if k.endswith("_token_id")}
        return Vocabulary(
            model=found["model"],
            pre=found["pre"],
            tokens=found["tokens"],
            types=found["token_type"],
            scores=found.get("scores", []),
            merges=found.get("merges", []),
            special=special,
            adds_bos=found["add_bos_token"],
            adds_eos=found["add_eos_token"],
            adds_space=found["add_space_prefix"],
            takes_space=self.keys["general.name"] == "phi-3",
            template=found["tokenizer.chat_template"],
        )


def _to_torch(tensor):
    shape = tuple(int(size) for size in reversed(tensor.shape))
    values = torch.from_numpy(np.array(tensor.data))
    if tensor.tensor_type.name == "BF16":
        values = values.view(torch.bfloat16)
    return values.view(shape)


@pytest.fixture(scope="session")
def read_gguf():
    """Reads a file with the gguf package."""
    return Gguf


@pytest.fixture(scope="session")
def mergeable_folder(tiny_model_folder, tmp_path_factory):
    """The folder of a tiny model whose tokenizer merges one pair, which llama.cpp asks for."""
    made = {}

    def folder_of(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp("mergeable") / family
            shutil.copytree(tiny_model_folder(family), made[family])
            path = made[family] / "tokenizer.json"
            parts = json.loads(path.read_text())
            parts["model"]["vocab"]["th"] = 261
            parts["model"]["merges"] = [["t", "h"]]
            path.write_text(json.dumps(parts))
        return made[family]

    return folder_of


@pytest.fixture(scope="session")
def adapter_of(tmp_path_factory):
    """Writes an adapter of rank 3 with random factors for a model folder."""

    def write(folder, **values):
        model, tokenizer = load_base(str(folder), "float32")
        adapt(model, rank=3, alpha=6, generator=torch.Generator().manual_seed(0), **values)
        generator = torch.Generator().manual_seed(1)
        for module in model.modules():
            if isinstance(module, LoRALinear):
                module.lora_B.data.normal_(std=0.2, generator=generator)
            elif isinstance(module, Experts):
                for key, factor in module.adapter_tensors():
                    if "lora_B" in key:
                        factor.data.normal_(std=0.2, generator=generator)
        out = tmp_path_factory.mktemp("adapter") / "adapter"
        return write_adapter(model, out, tokenizer=tokenizer, base=str(folder))

    return write
