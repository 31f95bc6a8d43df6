"""`nibble doctor`: what this machine has, and whether the arithmetic holds on it."""

import platform
from typing import Annotated, Any

import typer

from nibble.commands import progress
from nibble.units import size


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the environment and run the invariance checks; exit 1 if one fails."""
    report = {"environment": _environment(), "checks": _checks()}
    if as_json:
        typer.echo(progress.to_json(report))
    else:
        for name, value in report["environment"].items():
            typer.echo(f"{name:18} {value}")
        for name, is_right in report["checks"].items():
            typer.echo(f"{'ok  ' if is_right else 'FAIL'} {name}")
    if not all(report["checks"].values()):
        raise typer.Exit(1)


def _environment() -> dict[str, Any]:
    import torch

    from nibble.kernels.library import paths
    from nibble.train.manifest import package_version
    from nibble.train.memory import available_bytes

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    packages = ("nibble", "torch", "transformers", "safetensors")
    found = {name: package_version(name) for name in packages}
    return {
        "python": platform.python_version(),
        **found,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "free memory": size(available_bytes(device)),
        "threads": torch.get_num_threads(),
        **{f"{what} by": path for what, path in paths(device).items()},
    }


def _checks() -> dict[str, bool]:
    import torch

    from nibble.kernels.cross_entropy import head_cross_entropy, head_cross_entropy_reference
    from nibble.kernels.nf4 import dequantize, dequantize_reference, quantize
    from nibble.model.linear4bit import DenseLinear
    from nibble.model.lora import LoRALinear

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 128, generator=generator)
    q = quantize(weight)
    reference = dequantize_reference(q, out=torch.empty(64, 128, dtype=torch.bfloat16))
    linear = torch.nn.Linear(128, 64, bias=False)
    layer = LoRALinear(DenseLinear(linear), rank=4, alpha=8)
    x = torch.randn(9, 128, generator=generator)
    labels = torch.randint(0, 64, (9,), generator=generator)
    fast = head_cross_entropy(x, weight, labels)
    plain = head_cross_entropy_reference(x, weight, labels)
    return {
        "4-bit decode equals its reference": torch.equal(dequantize(q), reference),
        "a new adapter changes nothing": torch.equal(layer(x), linear(x)),
        "chunked loss equals full logits": bool(torch.isclose(fast, plain, rtol=1e-5)),
    }
