"""The main job on a CUDA device: `make gpu-check` runs these."""

import json

import pytest
import torch

import nibble
from nibble.events import StepEnd, read_events

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("type", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
def test_4_bit_weights_are_the_same_on_both_devices(type, double):
    weight = torch.randn(65, 193, dtype=torch.bfloat16)
    there = nibble.quantize(weight.cuda(), type=type, double=double)
    here = nibble.quantize(weight, type=type, double=double)
    assert torch.equal(there.codes.cpu(), here.codes)
    assert torch.equal(nibble.dequantize(there).cpu(), nibble.dequantize(here))


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_three_steps(tiny_model_folder, tmp_path, family, method):
    data = tmp_path / "train.jsonl"
    words = ("one", "two", "three", "four")
    rows = [{"prompt": f"say {word}", "completion": word} for word in words]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [
        f"model.name={tiny_model_folder(family)}",
        f"data.train={data}",
        f"out={tmp_path / 'out'}",
        f"method={method}",
        "data.max_seq_len=128",
        "train.steps=3",
        "optim.lr=1e-2",
        "optim.warmup=0",
    ]
    result = nibble.train(nibble.load_config(None, settings))
    events = read_events(result.out / "events.jsonl")
    losses = [event.loss for event in events if isinstance(event, StepEnd)]
    assert losses[2] < losses[0]
