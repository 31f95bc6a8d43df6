"""The Triton code of layers on CUDA devices; the code itself stands in `triton_kernels`.

It rounds where the references round. Sums of a row run in another order, and exponentials are
exact to a few units in the last place of float32.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn import functional as F

from nibble.kernels.layers_cpu import rows_of
from nibble.kernels.target import device_type, is_fake, report_kernel
from nibble.kernels.triton_support import is_right, is_wanted, launch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# 8 values a thread are one access of 16 bytes in bfloat16; more warps than 16 hold few registers.
VALUES_PER_WARP = 8 * 32
TILE_VALUES = 4 * VALUES_PER_WARP
MOST_WARPS = 16
# Heads of a token that a program rotates at once, in values of half a head.
ROTATED_VALUES = 2048
HEAD_BLOCK = 4096


class Library:
    """The operations on float tensors of one type whose last dimension is dense.

    Fake tensors get outputs without values, and what a kernel would read and write is reported.
    """

    def norm(
        self, x: Tensor, weight: Tensor, eps: float, unit_offset: bool
    ) -> tuple[Tensor, Tensor]:
        """y and 1 / rms(x), as `layers.rms_norm`: (..., D) -> (..., D) and (..., 1)."""
        x_TD, rstd = rows_of(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
        y_TD = torch.empty_like(x_TD)
        tensors = x_TD, weight, rstd, y_TD
        _run_on_rows("norm", tensors, eps, tuple(x_TD.shape), UNIT_OFFSET=unit_offset)
        return y_TD.view(x.shape), rstd

    def norm_again(self, x: Tensor, weight: Tensor, rstd: Tensor, unit_offset: bool) -> Tensor:
        """y once more."""
        x_TD = rows_of(x)
        y_TD = torch.empty_like(x_TD)
        tensors = x_TD, weight, rstd, y_TD
        _run_on_rows("norm_again", tensors, tuple(x_TD.shape), UNIT_OFFSET=unit_offset)
        return y_TD.view(x.shape)

    def norm_gradient(
        self, x: Tensor, weight: Tensor, rstd: Tensor, grad: Tensor, unit_offset: bool
    ) -> Tensor:
        """The gradient of x, from that of y."""
        x_TD, grad_TD = rows_of(x), rows_of(grad)
        grad_x_TD = torch.empty_like(x_TD)
        tensors = x_TD, weight, rstd, grad_TD, grad_x_TD
        _run_on_rows("norm_gradient", tensors, tuple(x_TD.shape), UNIT_OFFSET=unit_offset)
        return grad_x_TD.view(x.shape)

    def gated(self, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        """act(gate) * up, (..., F); the two evenly spaced alike."""
        gate_TF, up_TF = rows_of(gate, dense=False), rows_of(up, dense=False)
        y_TF = gate.new_empty(gate_TF.shape)
        _run_on_blocks("gated", (gate_TF, up_TF, y_TF), ACTIVATION=activation)
        return y_TF.view(gate.shape)

    def gated_gradient(
        self, gate: Tensor, up: Tensor, grad: Tensor, activation: str
    ) -> tuple[Tensor, Tensor]:
        """The gradients of gate and up, from that of the product."""
        gate_TF, up_TF = rows_of(gate, dense=False), rows_of(up, dense=False)
        grad_TF = rows_of(grad)
        grad_gate_TF, grad_up_TF = torch.empty_like(grad_TF), torch.empty_like(grad_TF)
        tensors = gate_TF, up_TF, grad_TF, grad_gate_TF, grad_up_TF
        _run_on_blocks("gated_gradient", tensors, ACTIVATION=activation)
        return grad_gate_TF.view(gate.shape), grad_up_TF.view(gate.shape)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, y: Tensor, *, back: bool) -> None:
        """Rotate x (H, T, K) into y, whatever their strides; cos and sin are (T, R), R <= K."""
        (num_heads, num_tokens, width), turned = x.shape, cos.shape[-1]
        half, rest = _power_of_2(turned // 2), width - turned
        num_at_once = min(_power_of_2(num_heads), max(1, ROTATED_VALUES // half))
        tile = num_at_once, half, _power_of_2(rest) if rest else 0
        grid = num_tokens, -(-num_heads // num_at_once)
        numbers = (num_heads, width, turned), (*x.stride()[:2], *y.stride()[:2])
        options = {"BACK": back, "TILE": tile, "num_warps": _num_warps(num_at_once * half)}
        _run("rotate", grid, (x, cos, sin, y), *numbers, **options)

    def head_(self, raw: Tensor, labels: Tensor, scale: float, softcap: float | None) -> Tensor:
        """Make raw logits (C, V) the gradient of their summed cross-entropy; returns the sum."""
        loss_C = raw.new_empty(len(raw), dtype=torch.float32)
        width = raw.shape[-1]
        block = min(HEAD_BLOCK, _power_of_2(width))
        options = {"BLOCK": block, "num_warps": _num_warps(block)}
        _run("head", (len(raw),), (raw, labels, loss_C), width, scale, softcap, **options)
        return loss_C.sum()


@cache
def load(device: torch.device) -> Library | None:
    """The operations, or None where they cannot be built for the device or do not agree."""
    what = "norms, gated units, rotations and the head"
    return Library() if is_right(agrees_with_reference, device, what=what) else None


def library_for(*tensors: Tensor) -> Library | None:
    """The operations if these are plain floats of one type on a CUDA device, or stand for such."""
    x = tensors[0]
    is_known = x.dtype in DTYPES and all(
        (type(t) in (Tensor, Parameter) or is_fake(t))
        and device_type(t) == "cuda"
        and t.dtype == x.dtype
        for t in tensors
    )
    if not is_known:
        return None
    # A plan is made without a device: it counts on what is wanted.
    return (Library() if is_wanted() else None) if is_fake(x) else load(x.device)


def agrees_with_reference(device: torch.device) -> bool:
    """Whether each operation gives what torch makes of it in float32, on small tensors."""
    generator = torch.Generator().manual_seed(0)
    x, up, weight = torch.randn(3, 6, 96, generator=generator).bfloat16().to(device)
    library, wide = Library(), x.float()
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    y, our_rstd = library.norm(x, weight[0], 1e-6, False)
    pairs = [(our_rstd, rstd), (y, wide * rstd * weight[0].float())]
    pairs.append((library.norm_again(x, weight[0], rstd, False), pairs[1][1]))
    leaf = wide.clone().requires_grad_()
    with torch.enable_grad():
        normed = leaf * torch.rsqrt(leaf.pow(2).mean(-1, keepdim=True) + 1e-6) * weight[0].float()
        (grad_x,) = torch.autograd.grad(normed, leaf, up.float())
        product = F.silu(leaf) * up.float()
        (grad_gate,) = torch.autograd.grad(product, leaf, weight.float())
        loss = F.cross_entropy(leaf, torch.arange(6, device=device), reduction="sum")
        (grad_raw,) = torch.autograd.grad(loss, leaf)
    pairs.append((library.norm_gradient(x, weight[0], rstd, up, False), grad_x))
    pairs.append((library.gated(x, up, "silu"), product))
    pairs.append((library.gated_gradient(x, up, weight, "silu")[0], grad_gate))
    turned, raw = torch.empty_like(x)[None], x.clone()
    library.rotate(x[None], weight, weight, turned, back=False)
    half_turn = torch.cat([-wide[:, 48:], wide[:, :48]], -1)
    pairs.append((turned[0], (wide + half_turn) * weight.float()))
    pairs.append((library.head_(raw, torch.arange(6, device=device), 1.0, None), loss))
    pairs.append((raw, grad_raw))
    return all(torch.allclose(a.float(), b.detach(), rtol=3e-2, atol=3e-2) for a, b in pairs)


def _run_on_rows(name: str, tensors: tuple[Tensor, ...], *numbers: Any, **options: Any) -> None:
    """Run a kernel whose programs take some whole rows of the first tensor."""
    num_rows, width = tensors[0].shape
    block = _power_of_2(width)
    tile = max(1, TILE_VALUES // block), block
    options |= {"TILE": tile, "num_warps": _num_warps(tile[0] * block)}
    _run(name, (-(-num_rows // tile[0]),), tensors, *numbers, **options)


def _run_on_blocks(name: str, tensors: tuple[Tensor, ...], **options: Any) -> None:
    """Run a kernel whose programs take a block of columns of a row of the first tensor."""
    num_rows, width = tensors[0].shape
    block = min(TILE_VALUES, _power_of_2(width))
    sizes = width, tensors[0].stride(0)
    grid = num_rows, -(-width // block)
    _run(name, grid, tensors, sizes, BLOCK=block, num_warps=_num_warps(block), **options)


def _run(
    name: str, grid: tuple[int, ...], tensors: tuple[Tensor, ...], *numbers: Any, **options: Any
) -> None:
    """Launch a kernel; on fake tensors say what it reads and writes."""
    if is_fake(tensors[0]):
        report_kernel("other", 0, sum(t.nbytes for t in tensors))
    else:
        launch(name, grid, tensors[0].device, *tensors, *numbers, **options)


def _power_of_2(number: int) -> int:
    """The next power of 2 that is not smaller."""
    return 1 << max(0, number - 1).bit_length()


def _num_warps(num_values: int) -> int:
    return max(1, min(MOST_WARPS, num_values // VALUES_PER_WARP))
