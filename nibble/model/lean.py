"""Norms, rotations and feed-forward parts of the known families, in the form that keeps the least.

A layer then keeps 4D + 2KV + 2F values a token: its two inputs of norms, queries, keys, values,
the output of attention, gate and up. Layers of other kinds stay as transformers has them.
"""

from functools import partial
from types import FunctionType, SimpleNamespace
from typing import Any

from torch import Tensor, nn

from nibble.kernels.few_rows import few_rows_product, is_few
from nibble.kernels.layers import gated, rms_norm
from nibble.kernels.rotary import rotary

# Whether the weight of a norm counts from one.
_UNIT_OFFSET = {
    "LlamaRMSNorm": False, "MistralRMSNorm": False, "MixtralRMSNorm": False,
    "Qwen2RMSNorm": False, "Qwen3RMSNorm": False, "Qwen3MoeRMSNorm": False,
    "Phi3RMSNorm": False, "GemmaRMSNorm": True, "Gemma2RMSNorm": True, "Gemma3RMSNorm": True,
}  # fmt: skip
# What transformers calls the activations that `gated` knows.
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return few_rows_product(x, weight) if is_few(x) else nn.functional.linear(x, weight)


def _norm(module: Any, unit_offset: bool, x: Tensor) -> Tensor:
    eps = module.eps if unit_offset else module.variance_epsilon
    return rms_norm(x, module.weight, eps, unit_offset=unit_offset)


def _feed_forward(module: Any, activation: str, x: Tensor) -> Tensor:
    return module.down_proj(gated(module.gate_proj(x), module.up_proj(x), activation))


def _fused_feed_forward(module: Any, activation: str, x: Tensor) -> Tensor:
    gate, up = module.gate_up_proj(x).chunk(2, dim=-1)
    return module.down_proj(gated(gate, up, activation))


_SEPARATE = (
    "LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "Qwen3MoeMLP", "GemmaMLP", "Gemma2MLP",
    "Gemma3MLP",
)  # fmt: skip
_GATED = {**dict.fromkeys(_SEPARATE, _feed_forward), "Phi3MLP": _fused_feed_forward}


# transformers' attention layers whose forward calls `apply_rotary_pos_emb` of their module.
_ROTATED = (
    "LlamaAttention", "MistralAttention", "MixtralAttention", "Qwen2Attention", "Qwen3Attention",
    "Qwen3MoeAttention", "GemmaAttention", "Gemma2Attention", "Gemma3Attention", "Phi3Attention",
)  # fmt: skip

# Layers that choose experts: they call `F.linear`.
_ROUTERS = ("MixtralTopKRouter", "Qwen3MoeTopKRouter")


def use_lean_layers(model: nn.Module) -> None:
    """Give the frozen parts of `model` that are known here their lean form, in place."""
    for module in model.modules():
        name = type(module).__name__
        if name in _UNIT_OFFSET:
            module.forward = partial(_norm, module, _UNIT_OFFSET[name])
        elif name in _GATED:
            activation = _activation(module)
            if activation is not None:
                module.forward = partial(_GATED[name], module, activation)
        elif name in _ROTATED:
            forward = _calling(type(module).forward, apply_rotary_pos_emb=rotary)
            module.forward = partial(forward, module)
        elif name in _ROUTERS:
            forward = _calling(type(module).forward, F=SimpleNamespace(linear=_linear))
            module.forward = partial(forward, module)


def is_gated_part(part: Any) -> bool:
    """Whether a module is a known feed-forward part, which looks at one token at a time."""
    return type(part).__name__ in _GATED


def _calling(function: Any, **names: Any) -> FunctionType:
    """The same function, which finds other things behind these names of its module."""
    changed = FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    changed.__kwdefaults__ = function.__kwdefaults__
    return changed


def _activation(module: Any) -> str | None:
    config = module.config
    name = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    return _ACTIVATIONS.get(str(name))
