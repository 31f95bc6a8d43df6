"""A simulated step against the same tracker on the same step with real tensors."""

import pytest
import torch

import nibble
from nibble.data.loader import Batch
from nibble.model import experts
from nibble.model.files import read_config
from nibble.model.linear4bit import fresh_scratch
from nibble.model.load import load_base
from nibble.plan.budget import workspace_bytes
from nibble.plan.devices import find_device
from nibble.plan.presets import preset_config
from nibble.plan.simulate import Shape, simulate
from nibble.plan.tracker import MemoryTracker
from nibble.plan.watch import watch_build, watch_evaluation, watch_step
from nibble.train.build import base_options

FAMILIES = ("llama", "gemma2", "mixtral")
METHODS = ("lora", "qlora", "full")
RECOMPUTE = ("none", "selective", "full", "offload", "tiled")
# Document lengths of each forward pass: one row, packed rows, accumulation. The passes of a step
# have one share of targets, so that the number of targets of the plan is that of the batch.
ROWS = (((96,),), ((60, 30, 38),), ((64, 64), (32, 96), (64,)))
EXTRAS = (
    (),
    ("lora.dropout=0.1", "optim.name=adamw8bit"),
    ("lora.rank=8", "lora.dtype=bfloat16"),
    ("optim.paged=true", "lora.rank=64"),
)
CASES = [
    (family, method, recompute, ROWS[(i + j + k) % 3], EXTRAS[(i + 2 * j + k) % 4])
    for i, family in enumerate(FAMILIES)
    for j, method in enumerate(METHODS)
    for k, recompute in enumerate(RECOMPUTE)
]


def run_of(folder, method, recompute, extra):
    settings = [f"method={method}", f"train.recompute={recompute}", "train.micro_batch_size=1"]
    return nibble.load_config(
        None, ["optim.paged=false", *settings, f"model.name={folder}", *extra]
    )


def real_batch(documents):
    """Random tokens; every token but the first of a document is a target."""
    length = sum(documents)
    ids = torch.randint(5, 250, (1, length))
    labels, positions = ids.clone(), torch.cat([torch.arange(n) for n in documents])[None]
    labels[positions == 0] = -100
    ends = torch.tensor([0, *documents]).cumsum(0).to(torch.int32)
    num_targets = length - len(documents)
    return Batch(ids, labels, positions, ends, max(documents), num_targets, (0,))


def track_real(run, folder, shape):
    nibble.quantize(torch.ones(64))  # tables that are made once a process
    with fresh_scratch() as buffers, MemoryTracker() as tracker:
        tracker.begin("load")
        model, _ = load_base(str(folder), **base_options(run))
        optimizer = watch_build(model, run, tracker)
        *batches, held_out = map(real_batch, [*shape.micro_batches, shape.eval_documents])
        watch_step(model, optimizer, run, batches, tracker, buffers)
        watch_evaluation(model, run, held_out, tracker, buffers)
    return tracker


@pytest.fixture
def even_routes(monkeypatch):
    """Real tokens spread over experts as the plan assumes: evenly."""
    routes = experts._routes

    def even(top_k_index, num_experts):
        flat = torch.arange(top_k_index.numel()) % num_experts
        return routes(flat.view_as(top_k_index), num_experts)

    monkeypatch.setattr(experts, "_routes", even)


@pytest.mark.parametrize(("family", "method", "recompute", "rows", "extra"), CASES)
def test_peaks_equal_those_of_real_tensors(
    tiny_model_folder, even_routes, family, method, recompute, rows, extra
):
    folder = tiny_model_folder(family)
    run = run_of(folder, method, recompute, extra)
    num_tokens, num_documents = sum(map(sum, rows)), sum(map(len, rows))
    shape = Shape(rows, rows[0], (num_tokens - num_documents) / num_tokens)
    planned = simulate(run, read_config(folder), shape, device="cpu")
    real = track_real(run, folder, shape)
    for phase in ("forward", "backward", "optimizer", "eval"):
        expected = real.peaks[phase]
        assert planned.phases[phase].bytes == expected.bytes, phase
        assert set(planned.phases[phase].parts) == set(expected.parts)


PLAIN = ("train.recompute=full",)
LEAST = (
    "train.recompute=tiled", "model.embeddings=host", "optim.name=adamw8bit", "optim.paged=true",
)  # fmt: skip


@pytest.mark.parametrize(
    ("model", "settings", "gigabytes"),
    [
        ("llama-2-7b", PLAIN, 5.6),
        ("llama-2-7b", LEAST, 4.6),
        ("llama-3.1-8b", PLAIN, 7.7),
        ("llama-3.1-8b", LEAST, 5.4),
    ],
)
def test_known_models_in_2048_tokens(model, settings, gigabytes):
    run = nibble.load_config(None, ["method=qlora", "optim.paged=false", *settings])
    simulation = simulate(run, preset_config(model), Shape(((2048,),)), device="cuda")
    needed = simulation.peak.bytes + workspace_bytes(find_device("H200"))
    assert needed <= gigabytes * 1e9


def test_what_waits_on_the_host_is_no_device_memory():
    """The table of embeddings and the inputs of layers; pages are neither."""
    values, shape = preset_config("llama-2-7b") | {"num_hidden_layers": 3}, Shape(((512,),))
    found = {}
    for place in ("device", "host"):
        run = nibble.load_config(
            None, ["method=qlora", "train.recompute=tiled", f"model.embeddings={place}"]
        ).with_values({"optim.paged": False}, "flag")
        found[place] = simulate(run, values, shape, device="cuda")
    table = 2 * values["vocab_size"] * values["hidden_size"]
    assert (found["device"].host_base_bytes, found["host"].host_base_bytes) == (0, table)
    assert found["device"].peak.bytes - found["host"].peak.bytes == table
    assert found["host"].paged_bytes == 0
    assert found["host"].offloaded_bytes == found["device"].offloaded_bytes > 0
