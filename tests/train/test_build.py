"""From the config to the storage of the base, the adapters and the optimizer."""

from functools import partial

import pytest
import torch

import nibble
from nibble.errors import UsageError
from nibble.model.families import decoder_layers
from nibble.model.load import load_base
from nibble.model.lora import LoRALinear
from nibble.model.recompute import apply_recompute
from nibble.train.build import autocast_of, base_options, equip, storage_of
from nibble.train.paging import PagedMoments, ResidentMoments


def _joined(pieces):
    return {name: torch.cat(parts) for name, parts in pieces.items()}


def is_recomputed(module):
    forward = module.forward
    return isinstance(forward, partial) and forward.func.__module__ == apply_recompute.__module__


BF16, F32 = torch.bfloat16, torch.float32
QUANT = {"block_size": 64, "double": True, "search": False}


def config(method, *overrides):
    fixed = ["model.name=x", "optim.paged=false", "train.recompute=none", f"method={method}"]
    return nibble.load_config(None, [*fixed, *overrides])


def equipped(folder, method, *overrides):
    run = config(method, *overrides)
    model, _ = load_base(str(folder), **base_options(run))
    return model, equip(model, run)


def factors(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_A" in n}


class TestBase:
    @pytest.mark.parametrize(
        ("method", "dtype", "storage", "type", "is_trained"),
        [
            ("lora", "bfloat16", "bf16", BF16, False),
            ("lora", "float32", "float32", F32, False),
            ("qlora", "bfloat16", "nf4", BF16, False),
            ("qlora", "float32", "nf4", F32, False),
            ("full", "bfloat16", "float32", F32, True),
            ("full", "float32", "float32", F32, True),
        ],
    )
    def test_how_each_method_keeps_it(self, method, dtype, storage, type, is_trained):
        options = base_options(config(method, f"model.dtype={dtype}"))
        expected = {"storage": storage, "dtype": type, "quant": QUANT, "trainable": is_trained}
        assert options == {**expected, "host_embeddings": False}

    def test_quantisation_is_as_asked(self):
        run = config("qlora", "quant.type=fp4", "quant.block_size=128", "quant.double=false")
        assert base_options(run)["storage"] == "fp4"
        stored = storage_of(run)
        assert stored.dtype == BF16
        assert stored.quant == {
            "type": "fp4",
            "block_size": 128,
            "double": False,
            "search": False,
        }

    @pytest.mark.parametrize(
        ("method", "dtype", "type"),
        [("lora", "bfloat16", BF16), ("lora", "float32", F32), ("full", "bfloat16", F32)],
    )
    def test_without_4_bits_nothing_is_quantised(self, method, dtype, type):
        stored = storage_of(config(method, f"model.dtype={dtype}"))
        assert (stored.dtype, stored.quant) == (type, None)
        assert stored.is_trainable == (method == "full")


@pytest.mark.parametrize(
    ("method", "dtype", "expected"),
    [
        ("full", "bfloat16", BF16),
        ("full", "float32", None),
        ("lora", "bfloat16", None),
        ("qlora", "bfloat16", None),
        ("qlora", "float32", None),
    ],
)
def test_only_weights_that_are_wider_than_products_are_cast(method, dtype, expected):
    assert autocast_of(config(method, f"model.dtype={dtype}")) is expected


class TestEquip:
    @pytest.mark.parametrize("method", ["lora", "qlora"])
    def test_adapters_are_as_asked_and_alone_are_trained(self, tiny_model_folder, method):
        overrides = ("lora.rank=4", "lora.alpha=12", "lora.dropout=0.25", "lora.target=[q_proj]")
        model, optimizer = equipped(tiny_model_folder("llama"), method, *overrides)
        layers = {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}
        assert {name.rpartition(".")[2] for name in layers} == {"q_proj"}
        assert len(layers) == 2
        for layer in layers.values():
            assert layer.lora_A.shape == (4, 64)
            assert layer.lora_A.dtype == F32
            assert (layer.scale, layer.dropout) == (3.0, 0.25)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert all("lora_" in name for name in trained)
        assert sum(len(group.parameters) for group in optimizer.groups) == len(trained) == 4

    def test_factors_have_the_type_that_is_asked_for(self, tiny_model_folder):
        model, _ = equipped(tiny_model_folder("llama"), "lora", "lora.dtype=bfloat16")
        assert {factor.dtype for factor in factors(model).values()} == {BF16}

    def test_the_seed_alone_decides_the_factors(self, tiny_model_folder):
        folder = tiny_model_folder("llama")
        torch.manual_seed(1)
        first = factors(equipped(folder, "lora")[0])
        before = torch.random.get_rng_state()
        torch.manual_seed(2)
        again = factors(equipped(folder, "qlora")[0])
        other = factors(equipped(folder, "lora", "train.seed=1")[0])
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert not any(torch.equal(first[name], other[name]) for name in first)
        torch.manual_seed(1)
        assert torch.equal(before, torch.random.get_rng_state())

    def test_full_fine_tuning_trains_every_value(self, tiny_model_folder):
        model, optimizer = equipped(tiny_model_folder("llama"), "full")
        assert all(p.requires_grad and p.dtype == F32 for p in model.parameters())
        assert not any(isinstance(module, LoRALinear) for module in model.modules())
        count = sum(p.numel() for group in optimizer.groups for p in group.parameters)
        assert count == sum(p.numel() for p in model.parameters())

    @pytest.mark.parametrize(
        ("recompute", "whole_layer", "feed_forward"),
        [
            ("none", False, False),
            ("selective", False, True),
            ("full", True, False),
            ("offload", True, False),
        ],
    )
    def test_layers_recompute_as_asked(
        self, tiny_model_folder, recompute, whole_layer, feed_forward
    ):
        folder = tiny_model_folder("llama")
        model, _ = equipped(folder, "lora", f"train.recompute={recompute}")
        for layer in decoder_layers(model):
            assert is_recomputed(layer) == whole_layer
            assert is_recomputed(layer.mlp) == feed_forward

    def test_an_open_policy_is_refused(self, tiny_model_folder):
        with pytest.raises(UsageError, match="recompute=auto"):
            equipped(tiny_model_folder("llama"), "lora", "train.recompute=auto")

    @pytest.mark.parametrize(
        ("overrides", "kind", "type"),
        [
            ((), ResidentMoments, F32),
            (("optim.paged=true",), PagedMoments, F32),
            (("optim.name=adamw8bit",), ResidentMoments, torch.uint8),
            (("optim.name=adamw8bit", "optim.paged=true"), PagedMoments, torch.uint8),
        ],
    )
    def test_moments_are_kept_as_asked(self, tiny_model_folder, overrides, kind, type):
        _, optimizer = equipped(tiny_model_folder("llama"), "lora", *overrides)
        assert isinstance(optimizer.moments, kind)
        assert type in {tensor.dtype for tensor in _joined(optimizer.moments.pieces()).values()}

    def test_factors_b_may_learn_faster(self, tiny_model_folder):
        overrides = ("optim.lora_plus_ratio=16", "optim.weight_decay=0.1")
        model, optimizer = equipped(tiny_model_folder("llama"), "lora", *overrides)
        assert optimizer.weight_decay == 0.1
        assert [group.lr_ratio for group in optimizer.groups] == [1.0, 16.0]
        assert len(optimizer.groups[0].parameters) == len(factors(model))
