"""Every key of the config does something: another value changes what a run is observed to do."""

import hashlib
import json
from collections import Counter

import pytest
import torch
from safetensors import safe_open

import nibble
from nibble.config import RunConfig
from nibble.errors import NibbleError
from nibble.events import (
    CheckpointSaved,
    EvalEnd,
    LoadEnd,
    PagesMoved,
    RunStart,
    StepEnd,
    WarningRaised,
)
from nibble.train.interrupt import StopSignal

# What a run is here unless a key says otherwise: nothing is left to a plan, nothing is random.
BASE = {
    "method": "lora",
    "model.dtype": "float32",
    "model.embeddings": "device",
    "data.max_seq_len": "64",
    "data.packing": "false",
    "train.batch_size": "4",
    "train.micro_batch_size": "4",
    "train.recompute": "none",
    "train.steps": "3",
    "optim.paged": "false",
    "optim.lr": "1e-2",
    "lora.rank": "4",
}
QLORA = {"method": "qlora"}
HELD_OUT = {"data.eval": "0.25"}
# key: other values, what they change, and the keys beside which that shows. The first value is
# always tried, the rest in the long version. Words in braces are files that the test makes.
KEYS = {
    "method": ("qlora full", "resident", {}),
    "out": ("{folder}/another", "out", {}),
    "model.name": ("{another_model}", "loss", {}),
    "model.revision": ("v2", "adapter", {}),
    "model.dtype": ("bfloat16", "resident", {}),
    "model.embeddings": ("host", "host_bytes_beside_a_gpu", {}),
    "quant.type": ("fp4", "loss", QLORA),
    "quant.block_size": ("128 256 512 1024", "resident", QLORA),
    "quant.double": ("false", "resident", QLORA),
    "quant.search": ("true", "loss", QLORA),
    "lora.rank": ("8", "num_trainable", {}),
    "lora.alpha": ("8", "loss", {}),
    "lora.dropout": ("0.5", "loss", {}),
    "lora.target": ("[q_proj]", "num_trainable", {}),
    "lora.dtype": ("bfloat16", "stored", {}),
    "lora.rslora": ("true", "loss", {}),
    "data.train": ("{another_data}", "tokens", {}),
    "data.eval": ("0.5", "rows", {}),
    "data.format": ("text messages", "targets", {"data.train": "{two_formats}"}),
    "data.max_seq_len": ("32", "tokens", {}),
    "data.packing": ("true", "rows", {"data.max_seq_len": "256"}),
    "data.train_on": ("last all", "targets", {}),
    "data.on_bad_row": ("skip", "refused", {"data.train": "{bad_row}"}),
    "data.on_long_row": ("drop stop", "rows", {"data.max_seq_len": "57"}),
    "train.epochs": ("2", "steps", {"train.steps": "null"}),
    "train.steps": ("2", "steps", {}),
    "train.batch_size": ("2", "tokens", {}),
    "train.micro_batch_size": ("1", "forwards", {}),
    "train.recompute": ("full selective", "forwards", {}),
    "train.exactness": ("exact", "is_deterministic", {}),
    "train.seed": ("1", "tokens", {}),
    "train.shard": ("true", "warnings", {}),
    "train.eval_every": ("1", "evals", HELD_OUT),
    "train.save_every": ("1", "saves", {}),
    "train.stop_within": ("7s", "patience", {}),
    "optim.name": ("adamw8bit", "moments", {}),
    "optim.paged": ("true", "has_pages", {}),
    "optim.lr": ("1e-3", "lr", {}),
    "optim.schedule": ("constant linear", "lr", {"train.steps": "4"}),
    "optim.warmup": ("0.5", "lr", {}),
    "optim.weight_decay": ("0.1", "weights", {}),
    "optim.max_grad_norm": ("1e-3", "weights", {}),
    "optim.lora_plus_ratio": ("4", "weights", {}),
}


def test_every_key_is_in_the_table():
    assert KEYS.keys() == RunConfig().flat().keys()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("keys")


@pytest.fixture(scope="module")
def files(folder, tiny_model_folder):
    """The values in braces."""
    turns = [
        [
            ("user", "hi" * n),
            ("assistant", "a" * n),
            ("user", "?"),
            ("assistant", "b" * (n % 3 + 1)),
        ]
        for n in range(1, 9)
    ]
    talks = [
        {"messages": [{"role": role, "content": content} for role, content in talk]}
        for talk in turns
    ]
    alpaca = [{"instruction": f"say {n}", "output": "yes", "text": "no" * n} for n in range(1, 9)]
    data = {
        "data": talks,
        "another_data": talks[2:6],
        "two_formats": alpaca,
        "bad_row": [*talks, {"messages": 3}],
    }
    found = {"folder": folder, "another_model": tiny_model_folder("qwen2")}
    for name, rows in data.items():
        found[name] = folder / f"{name}.jsonl"
        found[name].write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return {**found, "model": tiny_model_folder("llama")}


@pytest.fixture(scope="module")
def observed(folder, files):
    """What a run with these keys does; a run is done once, or once more."""
    known = {}

    def observe(aspect, overrides, attempt=1):
        name = hashlib.sha256(repr((sorted(overrides.items()), attempt)).encode()).hexdigest()[:12]
        places = {"model.name": files["model"], "data.train": files["data"]}
        settings = {**places, "out": folder / name, **BASE, **overrides}
        words = [f"{key}={str(value).format(**files)}" for key, value in settings.items()]
        run = nibble.load_config(None, words)
        if aspect == "host_bytes_beside_a_gpu":
            return nibble.plan(run, "24GiB").host_memory_bytes
        if name not in known:
            known[name] = _observe(run)
        return known[name].get(aspect)

    return observe


@pytest.mark.torture
@pytest.mark.parametrize("key", KEYS)
def test_another_value_changes_what_a_run_does(observed, is_torture, key):
    values, aspect, beside = KEYS[key]
    before = observed(aspect, beside)
    for value in values.split() if is_torture else values.split()[:1]:
        assert observed(aspect, {**beside, key: value}) != before, value


@pytest.mark.torture
def test_the_same_values_change_nothing(observed, is_torture):
    """Or else a difference would say nothing of a key."""
    for key in KEYS.keys() - {"out"} if is_torture else ("train.seed", "quant.search"):
        _, aspect, beside = KEYS[key]
        assert observed(aspect, beside) == observed(aspect, beside, attempt=2), key


@pytest.mark.parametrize(
    ("beside", "key", "reason"),
    [
        ({}, "quant.block_size", "method=lora"),
        ({"method": "full"}, "lora.alpha", "method=full"),
        ({"method": "full"}, "optim.lora_plus_ratio", "method=full"),
        ({}, "train.epochs", "train.steps"),
    ],
)
def test_a_key_that_does_nothing_beside_others_says_so(observed, beside, key, reason):
    value = KEYS[key][0].split()[0]
    warnings = observed("warnings", {**beside, key: value})
    assert f"{key} does nothing with {reason}" in warnings
    assert not any(key in warning for warning in observed("warnings", beside))


def _observe(run):
    events, patience, is_deterministic, forwards = [], [], [], Counter()

    def emit(event):
        events.append(event)
        if isinstance(event, StepEnd):
            is_deterministic.append(torch.are_deterministic_algorithms_enabled())

    def wait(stop, within):
        patience.append(within)
        return inner(stop, within)

    inner = StopSignal.patience
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: forwards.update([type(module).__name__])
    )
    refused = ""
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(StopSignal, "patience", wait)
            result = nibble.train(run, emit)
    except NibbleError as error:
        refused = error.what
    finally:
        hook.remove()
    found = {"refused": refused, "patience": patience[:1], "is_deterministic": is_deterministic}
    return found if refused else {**found, **_left(result), **_told(events), "forwards": forwards}


def _told(events):
    """What the events of a run say that is no time."""

    def all_of(kind, name):
        return [getattr(event, name) for event in events if isinstance(event, kind)]

    return {
        "resident": all_of(LoadEnd, "resident_bytes"),
        "num_trainable": all_of(LoadEnd, "num_trainable"),
        "rows": [*all_of(RunStart, "num_train_rows"), *all_of(RunStart, "num_eval_rows")],
        "steps": all_of(RunStart, "steps"),
        "tokens": all_of(StepEnd, "tokens"),
        "targets": all_of(StepEnd, "num_target_tokens"),
        "loss": all_of(StepEnd, "loss"),
        "lr": all_of(StepEnd, "learning_rate"),
        "evals": all_of(EvalEnd, "step"),
        "saves": all_of(CheckpointSaved, "step"),
        "has_pages": bool(all_of(PagesMoved, "step")),
        "warnings": all_of(WarningRaised, "message"),
    }


def _left(result):
    """What a run leaves in its folder."""
    weights = next(result.adapter.glob("*model.safetensors"))
    config = next(result.adapter.glob("adapter_config.json"), result.adapter / "config.json")
    state = max(result.out.glob("checkpoints/*/state.safetensors"))
    return {
        "out": result.out.name,
        "adapter": json.loads(config.read_text()),
        "weights": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "stored": _types(weights),
        "moments": _types(state),
    }


def _types(path):
    with safe_open(path, "pt") as file:
        return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
