"""Compile every Triton kernel for three generations of GPUs, without one, and note what it takes.

python tools/compile_triton.py            writes tests/golden/triton_resources.json
python tools/compile_triton.py --check    fails if that would change it

A kernel is compiled as the first call with such tensors on such a GPU would compile it. Figures
belong to the version of Triton in constraints.txt; with any other nothing is compared.
"""

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

# Kernels of the interpreter cannot be compiled; Triton looks when it is imported.
os.environ.pop("TRITON_INTERPRET", None)

import torch
from torch import Tensor

from nibble.kernels import layers_triton, nf4, nf4_triton

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden" / "triton_resources.json"
GENERATIONS = (80, 90, 100)

Resources = dict[str, dict[str, dict[str, int]]]


def call_all(compiler: "_Compiler") -> None:
    """Every kernel on tensors as in an 8B model, in bfloat16; decoding to the other types too."""
    for dtype in nf4_triton.DTYPES:
        compiler.begin(str(dtype).removeprefix("torch."))
        _decode(nf4.quantize(torch.zeros(64, 4096)), dtype)
    compiler.begin("single scales")
    _decode(nf4.quantize(torch.zeros(64, 4096), double=False), torch.bfloat16)
    compiler.begin("odd start")
    _decode(nf4.quantize(torch.zeros(64, 4096)), torch.bfloat16, start=3)
    library = layers_triton.Library()
    for width in (128, 4096, 8192, 16384):
        compiler.begin(f"{width} wide")
        _norms(library, _empty(16, width), unit_offset=False)
    compiler.begin("4096 wide, unit offset")
    _norms(library, _empty(16, 4096), unit_offset=True)
    gate, up = _empty(16, 2 * 14336).chunk(2, -1)
    for activation in ("silu", "gelu_tanh"):
        compiler.begin(activation)
        library.gated_gradient(gate, up, library.gated(gate, up, activation), activation)
    heads, angles = _empty(16, 32, 128).transpose(0, 1), _empty(16, 128)
    for back, turned in ((False, 128), (True, 128), (False, 96)):
        compiler.begin(f"{'back' if back else 'forward'}, {turned} of 128")
        cos = angles[:, :turned].contiguous()
        library.rotate(heads, cos, cos, _empty(32, 16, 128), back=back)
    for name, softcap in (("no soft cap", None), ("soft cap", 30.0)):
        compiler.begin(name)
        library.head_(_empty(4, 128256), torch.zeros(4, dtype=torch.int64), 1.0, softcap)


def _decode(q: nf4.Quantized, dtype: torch.dtype, start: int = 0) -> None:
    nf4_triton.decode(q, torch.empty(q.numel - start, dtype=dtype), start)


def _norms(library: layers_triton.Library, x: Tensor, *, unit_offset: bool) -> None:
    y, rstd = library.norm(x, x[0], 1e-6, unit_offset)
    library.norm_again(x, x[0], rstd, unit_offset)
    library.norm_gradient(x, x[0], rstd, y, unit_offset)


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16)


class _Compiler:
    """Compiles for one generation what would be launched; is as much of a driver as that takes."""

    def __init__(self, generation: int, resources: Resources) -> None:
        self._generation, self._resources = generation, resources
        self._case = ""

    def begin(self, case: str) -> None:
        """What is launched from here on is named after its kernel and this."""
        self._case = case

    def launch(self, name: str, grid: Any, device: Any, *arguments: Any, **options: Any) -> None:
        """In place of `triton_support.launch`."""
        from nibble.kernels import triton_kernels

        kernel = getattr(triton_kernels, name)
        compiled = kernel.warmup(*arguments, grid=grid, **options, enable_fp_fusion=False)
        taken = self._resources.setdefault(f"{name}: {self._case}", {})
        taken[f"sm_{self._generation}"] = _resources_of(compiled)

    def get_current_target(self) -> Any:
        """For Triton."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._generation, 32)

    def get_current_device(self) -> int:
        """For Triton, which keeps what it has compiled by device."""
        return self._generation

    def get_current_stream(self, device: int) -> int:
        """For Triton."""
        return 0


def _resources_of(compiled: Any) -> dict[str, int]:
    """Registers a thread, shared bytes a program, and bytes a thread that registers do not hold."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    return {
        "registers": found["REG"],
        "shared_bytes": compiled.metadata.shared,
        "spilled_bytes": found["STACK"] + found["LOCAL"],
    }


def measure() -> Resources:
    """What every kernel takes on every generation."""
    from triton.runtime import driver

    resources: Resources = {}
    for generation in GENERATIONS:
        compiler = _Compiler(generation, resources)
        driver.set_active(compiler)
        with (
            mock.patch.object(nf4_triton, "launch", compiler.launch),
            mock.patch.object(layers_triton, "launch", compiler.launch),
        ):
            call_all(compiler)
    return resources


def _is_pinned() -> bool:
    """Whether the version of Triton is the one of the golden file; says so if not."""
    (pinned,) = re.findall(r"^triton==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    try:
        installed = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        installed = "not installed"
    if installed != pinned:
        print(f"Triton is {installed}, figures are of {pinned}: nothing compiled")
    return installed == pinned


def main() -> None:
    """Write the golden file, or compare with it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="Compare instead of writing.")
    is_check = parser.parse_args().check
    if not _is_pinned():
        return
    text = json.dumps(measure(), indent=1) + "\n"
    if not is_check:
        GOLDEN.write_text(text, encoding="utf-8")
    elif text != GOLDEN.read_text(encoding="utf-8"):
        raise SystemExit(f"{GOLDEN.name} is out of date: run python tools/compile_triton.py")


if __name__ == "__main__":
    main()
