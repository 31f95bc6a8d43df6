"""A good adapter and a good checkpoint, to be spoilt."""

import torch
from torch import nn

from nibble.adapter.format import write_adapter
from nibble.model.adapt import adapt
from nibble.model.load import load_base
from nibble.train.checkpoint import TrainState, save
from nibble.train.optimizer import AdamW, ParameterGroup


def write_adapter_folder(model, folder):
    base, _ = load_base(str(model), "float32")
    adapt(base, rank=3, alpha=5)
    return write_adapter(base, folder)


def optimizer():
    return AdamW([ParameterGroup((nn.Parameter(torch.ones(4)),))])


def write_checkpoint(folder):
    save(folder, TrainState(1), optimizer(), identity={"data": "x"})
    return folder
