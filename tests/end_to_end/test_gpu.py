"""The main job on a CUDA device: `make gpu-check` runs these."""

import json
import os
import signal

import pytest
import torch

import nibble
from nibble.disk import file_sha256
from nibble.errors import StoppedError
from nibble.events import StepEnd, read_events
from nibble.model.recompute import HostInputs
from nibble.train.optimizer import AdamW, ParameterGroup

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def _joined(pieces):
    return {name: torch.cat(parts) for name, parts in pieces.items()}


@pytest.mark.parametrize("type", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
def test_4_bit_weights_are_the_same_on_both_devices(type, double):
    weight = torch.randn(65, 193, dtype=torch.bfloat16)
    there = nibble.quantize(weight.cuda(), type=type, double=double)
    here = nibble.quantize(weight, type=type, double=double)
    assert torch.equal(there.codes.cpu(), here.codes)
    assert torch.equal(nibble.dequantize(there).cpu(), nibble.dequantize(here))


@pytest.mark.parametrize("budget_in_pages", [2, 5])
@pytest.mark.parametrize("bits", [32, 8])
def test_paged_moments_are_the_same_bits(bits, budget_in_pages):
    def train(**options):
        parameter = torch.nn.Parameter(torch.linspace(-1, 1, 10 * (1 << 16) + 7, device="cuda"))
        page_bytes = (1 << 16) * bits // 4
        optimizer = AdamW(
            [ParameterGroup((parameter,))], bits=bits, page_bytes=page_bytes, **options
        )
        generator = torch.Generator("cuda").manual_seed(0)
        for _ in range(50):
            parameter.grad.normal_(generator=generator)
            optimizer.step(1e-2)
        return optimizer

    budget_bytes = budget_in_pages * (1 << 16) * bits // 4
    paged, resident = train(is_paged=True, budget_bytes=budget_bytes), train()
    assert paged.moments.device_bytes <= budget_bytes
    assert paged.moments.pages_in >= 50 * (11 - budget_in_pages)
    assert paged.moments.stall_seconds >= 0
    there, here = _joined(paged.state_pieces()), _joined(resident.state_pieces())
    assert all(torch.equal(there[name].cpu(), here[name].cpu()) for name in here)


def test_layer_inputs_come_back_from_the_host():
    inputs, values, kept = HostInputs(), [], []
    x = torch.randn(2048, 2048, device="cuda")
    for _ in range(8):
        kept.append(inputs.keep(x))
        values.append(x.clone().cpu())
        x = (x @ x).tanh()
    del x
    for one, expected in zip(reversed(kept), reversed(values), strict=True):
        x = inputs.take(one)
        y = x.clone()
        del x
        torch.full((2048, 2048), torch.nan, device="cuda")
        assert torch.equal(y.cpu(), expected)


LEAST_MEMORY = ["optim.name=adamw8bit", "optim.paged=true", "train.recompute=offload"]


@pytest.mark.parametrize("more", [[], LEAST_MEMORY], ids=["default", "least memory"])
@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_three_steps(tiny_model_folder, tmp_path, family, method, more):
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
        *more,
    ]
    result = nibble.train(nibble.load_config(None, settings))
    events = read_events(result.out / "events.jsonl")
    losses = [event.loss for event in events if isinstance(event, StepEnd)]
    assert losses[2] < losses[0]


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_exact_runs_are_equal_and_so_is_one_that_was_stopped(tiny_model_folder, tmp_path, method):
    data = tmp_path / "train.jsonl"
    rows = [{"prompt": f"say {n} again", "completion": f"{n} again"} for n in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(name):
        settings = [
            *(f"model.name={tiny_model_folder('llama')}", f"data.train={data}"),
            *(f"out={tmp_path / name}", f"method={method}", "data.max_seq_len=128"),
            *("train.steps=100", "train.exactness=exact", "lora.dropout=0.1"),
            *("train.batch_size=4", "train.micro_batch_size=2"),
        ]
        return nibble.load_config(None, settings)

    def stop_halfway(event):
        if isinstance(event, StepEnd) and event.step == 50:
            os.kill(os.getpid(), signal.SIGTERM)

    first, second = (nibble.train(run(name)) for name in ("first", "second"))
    with pytest.raises(StoppedError):
        nibble.train(run("third"), stop_halfway)
    third = nibble.train(run("third"))
    files = [result.adapter / "adapter_model.safetensors" for result in (first, second, third)]
    assert len({file_sha256(file) for file in files}) == 1
