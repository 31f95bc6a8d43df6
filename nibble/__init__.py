"""nibble fine-tunes large language models with LoRA and QLoRA.

    run = nibble.load_config("recipe.yaml", ["optim.lr=1e-4"])
    result = nibble.train(run)

Names load on first use, so `import nibble` costs neither torch nor transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

from nibble.environment import bound_caches

if TYPE_CHECKING:
    from nibble.adapter.certificate import Certificate
    from nibble.adapter.format import read_adapter, write_adapter
    from nibble.api import merge
    from nibble.config import RunConfig, load_config
    from nibble.kernels.nf4 import Quantized, dequantize, quantize
    from nibble.model.adapt import AdaptedLayers, adapt
    from nibble.model.load import load_base
    from nibble.plan.plan import Plan
    from nibble.plan.plan import make_plan as plan
    from nibble.serve.generate import generate
    from nibble.train.result import Result
    from nibble.train.trainer import train

__version__ = "0.1.0"

bound_caches()

_HOME = {
    "AdaptedLayers": "nibble.model.adapt",
    "Certificate": "nibble.adapter.certificate",
    "Quantized": "nibble.kernels.nf4",
    "Plan": "nibble.plan.plan",
    "Result": "nibble.train.result",
    "RunConfig": "nibble.config",
    "adapt": "nibble.model.adapt",
    "dequantize": "nibble.kernels.nf4",
    "generate": "nibble.serve.generate",
    "load_base": "nibble.model.load",
    "load_config": "nibble.config",
    "merge": "nibble.api",
    "quantize": "nibble.kernels.nf4",
    "read_adapter": "nibble.adapter.format",
    "write_adapter": "nibble.adapter.format",
}

_CALLABLE_ROOMS = {"plan", "train"}

__all__ = [
    "AdaptedLayers",
    "Certificate",
    "Plan",
    "Quantized",
    "Result",
    "RunConfig",
    "adapt",
    "dequantize",
    "generate",
    "load_base",
    "load_config",
    "merge",
    "plan",
    "quantize",
    "read_adapter",
    "train",
    "write_adapter",
]


def __getattr__(name: str) -> Any:
    if name in _CALLABLE_ROOMS:
        return importlib.import_module(f"nibble.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'nibble' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
