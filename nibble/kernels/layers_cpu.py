"""The compiled code of layers in bfloat16 on CPUs; `compiled` builds it.

It rounds where the references round. Sums of a row run in another order, and exponentials are
exact to 2 units in the last place of float32.
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from nibble.kernels.compiled import in_parts, load_compiled
from nibble.kernels.target import device_type, is_fake, report_kernel

SOURCE = Path(__file__).with_name("layers_cpu.c")
FLAGS = ("-ffp-contract=fast",)
# Work below this many values is done by the calling thread alone.
VALUES_PER_THREAD = 1 << 16
_PLAIN = (Tensor, Parameter)
_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
_POINTER, _INT64, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float


class _Cached(ctypes.Structure):
    """`Cached` of layers_cpu.c."""

    _fields_ = (
        *((name, _POINTER) for name in ("query", "key", "value", "y")),
        *((name, _POINTER) for name in ("keys", "values", "lengths", "rooms")),
        ("strides", _INT64 * 6),
        *((name, _INT64) for name in ("heads", "key_heads", "width", "window")),
        *((name, _FLOAT) for name in ("scale", "softcap")),
    )


class Kept:
    """Where sequences keep their keys and values of one layer.

    Shapes:
        keys of a sequence: (G, K, room), values: (G, room, K).

    Args:
        lengths: How many keys each sequence keeps, as a ctypes array that others update.
    """

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor], lengths: Any) -> None:
        count = len(keys)
        self.keys = (_POINTER * count)(*(x.data_ptr() for x in keys))
        self.values = (_POINTER * count)(*(x.data_ptr() for x in values))
        self.rooms = (_INT64 * count)(*(x.shape[1] for x in values))
        self.lengths = lengths


class Library:
    """The operations of the compiled code on bfloat16 tensors whose last dimension is dense.

    Rows are split over `torch.get_num_threads()` threads; the result does not depend on it.

    Args:
        path: The shared library.

    Raises:
        OSError: If it cannot be loaded.
    """

    def __init__(self, path: Path) -> None:
        code: Any = ctypes.CDLL(str(path))
        pointers = [_POINTER] * 4
        code.nibble_norm.argtypes = [*pointers[:2], _FLOAT, _INT, _INT64, _INT64, *pointers[:2]]
        code.nibble_norm_again.argtypes = [*pointers[:3], _INT, _INT64, _INT64, _POINTER]
        code.nibble_norm_gradient.argtypes = [*pointers, _INT, _INT64, _INT64, _POINTER]
        code.nibble_gated.argtypes = [*pointers[:2], _INT, *[_INT64] * 3, _POINTER]
        code.nibble_gated_gradient.argtypes = [*pointers[:3], _INT, *[_INT64] * 3, *pointers[:2]]
        code.nibble_rotate.argtypes = [*pointers[:3], _FLOAT, *pointers[:3]]
        code.nibble_attend.argtypes = [_POINTER, _FLOAT, *[_INT64] * 3]
        code.nibble_attend_gradient.argtypes = [*pointers[:2], _FLOAT, *[_INT64] * 3]
        code.nibble_attention_floats.argtypes = [_INT64, _INT64, _INT]
        code.nibble_attention_floats.restype = _INT64
        code.nibble_attention.argtypes = [
            *(*pointers[:3], *[_INT64] * 3, _FLOAT, _INT, _INT64, _INT64, _POINTER)
        ]
        code.nibble_cached_floats.argtypes = [_INT64, _INT64]
        code.nibble_cached_floats.restype = _INT64
        code.nibble_cached_attention.argtypes = [_POINTER, _INT64, _INT64, _POINTER]
        code.nibble_head.argtypes = [*pointers[:2], _FLOAT, _FLOAT, _INT64, _INT64]
        code.nibble_head.restype = ctypes.c_double
        self._code = code

    def norm(
        self, x: Tensor, weight: Tensor, eps: float, unit_offset: bool
    ) -> tuple[Tensor, Tensor]:
        """y and 1 / rms(x), as `layers.rms_norm`: (..., D) -> (..., D) and (..., 1)."""
        x_TD, rstd = rows_of(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
        y_TD, rstd_T = torch.empty_like(x_TD), rstd.view(-1)

        def work(row: int, stop: int) -> None:
            self._code.nibble_norm(
                *(_at(x_TD, row), weight.data_ptr(), eps, unit_offset, stop - row, x.shape[-1]),
                *(_at(y_TD, row), _at(rstd_T, row)),
            )

        _run(work, x_TD, y_TD)
        return y_TD.view(x.shape), rstd

    def norm_again(self, x: Tensor, weight: Tensor, rstd: Tensor, unit_offset: bool) -> Tensor:
        """y once more."""
        x_TD, rstd_T = rows_of(x), rstd.view(-1)
        y_TD = torch.empty_like(x_TD)

        def work(row: int, stop: int) -> None:
            self._code.nibble_norm_again(
                *(_at(x_TD, row), weight.data_ptr(), _at(rstd_T, row), unit_offset),
                *(stop - row, x.shape[-1], _at(y_TD, row)),
            )

        _run(work, x_TD, y_TD)
        return y_TD.view(x.shape)

    def norm_gradient(
        self, x: Tensor, weight: Tensor, rstd: Tensor, grad: Tensor, unit_offset: bool
    ) -> Tensor:
        """The gradient of x, from that of y."""
        x_TD, grad_TD, rstd_T = rows_of(x), rows_of(grad), rstd.view(-1)
        grad_x_TD = torch.empty_like(x_TD)

        def work(row: int, stop: int) -> None:
            self._code.nibble_norm_gradient(
                *(_at(x_TD, row), weight.data_ptr(), _at(rstd_T, row), _at(grad_TD, row)),
                *(unit_offset, stop - row, x.shape[-1], _at(grad_x_TD, row)),
            )

        _run(work, x_TD, grad_TD, grad_x_TD)
        return grad_x_TD.view(x.shape)

    def gated(self, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        """act(gate) * up, (..., F); the two evenly spaced alike."""
        gate_TF, up_TF = rows_of(gate, dense=False), rows_of(up, dense=False)
        y_TF = gate_TF.new_empty(gate_TF.shape)
        width, stride = gate.shape[-1], gate_TF.stride(0)

        def work(row: int, stop: int) -> None:
            self._code.nibble_gated(
                *(_at(gate_TF, row), _at(up_TF, row), _ACTIVATIONS[activation]),
                *(stop - row, width, stride, _at(y_TF, row)),
            )

        _run(work, gate_TF, up_TF, y_TF)
        return y_TF.view(gate.shape)

    def gated_gradient(
        self, gate: Tensor, up: Tensor, grad: Tensor, activation: str
    ) -> tuple[Tensor, Tensor]:
        """The gradients of gate and up, from that of the product."""
        gate_TF, up_TF, grad_TF = (
            rows_of(gate, dense=False),
            rows_of(up, dense=False),
            rows_of(grad),
        )
        grad_gate_TF, grad_up_TF = torch.empty_like(grad_TF), torch.empty_like(grad_TF)
        width, stride = gate.shape[-1], gate_TF.stride(0)

        def work(row: int, stop: int) -> None:
            self._code.nibble_gated_gradient(
                *(_at(gate_TF, row), _at(up_TF, row), _at(grad_TF, row)),
                *(_ACTIVATIONS[activation], stop - row, width, stride),
                *(_at(grad_gate_TF, row), _at(grad_up_TF, row)),
            )

        _run(work, gate_TF, up_TF, grad_TF, grad_gate_TF, grad_up_TF)
        return grad_gate_TF.view(gate.shape), grad_up_TF.view(gate.shape)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, y: Tensor, *, back: bool) -> None:
        """Rotate x (H, T, K) into y, whatever their strides; cos and sin are (T, R), R <= K."""
        strides = _int64s(*x.stride()[:2], *y.stride()[:2])

        def work(head: int, stop: int) -> None:
            sizes = _int64s(stop - head, *x.shape[1:], cos.shape[-1])
            self._code.nibble_rotate(
                *(_at(x, head), cos.data_ptr(), sin.data_ptr(), -1.0 if back else 1.0),
                *(sizes, strides, _at(y, head)),
            )

        _run(work, x, y)

    def attend_(self, scores: Tensor, scale: float) -> None:
        """Make scores of causal rows (M, rows, keys) probabilities; the last row sees all keys.

        Scores are float32.
        """
        rows, keys = scores.shape[1:]

        def work(matrix: int, stop: int) -> None:
            sizes = stop - matrix, rows, keys
            _check(self._code.nibble_attend(_at(scores, matrix), scale, *sizes))

        _run(work, scores)

    def attend_gradient_(self, scores: Tensor, grad: Tensor, scale: float) -> None:
        """Make float32 scores probabilities, and their gradient that of the scores, both scaled."""
        rows, keys = scores.shape[1:]

        def work(matrix: int, stop: int) -> None:
            addresses, sizes = (_at(scores, matrix), _at(grad, matrix)), (stop - matrix, rows, keys)
            _check(self._code.nibble_attend_gradient(*addresses, scale, *sizes))

        _run(work, scores, grad)

    def attend_documents(
        self, states: Sequence[Tensor], documents: Sequence[int], scale: float
    ) -> None:
        """Causal attention inside each document, products and softmax in float32.

        Args:
            states: q, k, v and y, which is written; or q, k, v, the gradient of y, and those of q,
                k and v, which are written. Heads (1, H or G, T, K) whatever their strides.
            documents: Boundaries from 0 to T.
        """
        query, key = states[:2]
        num_heads, num_key_heads, width = query.shape[1], key.shape[1], query.shape[-1]
        is_gradient, num_parts = len(states) > 4, (len(documents) - 1) * num_key_heads
        longest = max(stop - start for start, stop in pairwise(documents))
        num_floats = self._code.nibble_attention_floats(longest, width, is_gradient)
        num_threads = min(torch.get_num_threads(), num_parts)
        memory = query.new_empty(num_threads, num_floats, dtype=torch.float32)
        if is_fake(query):
            return
        addresses = (_POINTER * len(states))(*[x.data_ptr() for x in states])
        steps = [stride for x in states for stride in x.stride()[1:3]]
        strides, ends = (
            (ctypes.c_int64 * len(values))(*values) for values in (steps, list(documents))
        )

        def work(part: int, stop: int) -> None:
            self._code.nibble_attention(
                *(addresses, strides, ends, num_heads, num_key_heads, width, scale, is_gradient),
                *(part, stop, _at(memory, part * num_threads // num_parts)),
            )

        in_parts(work, num_parts, least=1)

    def attend_cached(
        self,
        states: Sequence[Tensor],
        kept: Kept,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> None:
        """Keep one new token of each sequence and attend to all that it keeps.

        Args:
            states: q, k and v, (1, H or G, T, K) whatever their strides, and y (1, T, H, K), which
                is written.
        """
        query, key, value, _ = states
        num_heads, num_tokens, width = query.shape[1:]
        call = _Cached(
            *(x.data_ptr() for x in states),
            *(ctypes.addressof(x) for x in (kept.keys, kept.values, kept.lengths, kept.rooms)),
            _int64s(*query.stride()[1:3], *key.stride()[1:3], *value.stride()[1:3]),
            *(num_heads, key.shape[1], width, window or 1 << 62, scale, softcap or 0.0),
        )
        most = max(kept.lengths) + 1
        num_floats = self._code.nibble_cached_floats(most, width)
        num_parts = num_tokens * key.shape[1]

        def work(part: int, stop: int) -> None:
            memory = torch.empty(num_floats)
            address = ctypes.addressof(call)
            self._code.nibble_cached_attention(address, part, stop, memory.data_ptr())

        least = VALUES_PER_THREAD // (width * most * num_heads // key.shape[1])
        in_parts(work, num_parts, least=max(1, least))

    def head_(self, raw: Tensor, labels: Tensor, scale: float, softcap: float | None) -> Tensor:
        """Make raw logits (C, V) the gradient of their summed cross-entropy; returns the sum.

        Raises:
            IndexError: If a label is not in [0, V).
        """
        width, labels = raw.shape[-1], labels.long().contiguous()
        losses: dict[int, float] = {}
        if not is_fake(raw) and not bool(((labels >= 0) & (labels < width)).all()):
            raise IndexError(f"labels are at least 0 and below {width}")

        def work(row: int, stop: int) -> None:
            addresses = _at(raw, row), _at(labels, row)
            losses[row] = self._code.nibble_head(
                *addresses, scale, softcap or 0.0, stop - row, width
            )

        _run(work, raw)
        total = sum(losses[row] for row in sorted(losses))
        return torch.tensor(total, dtype=torch.float32, device=raw.device)


@cache
def load() -> Library | None:
    """The compiled code, or None where it cannot be built or does not agree."""
    return load_compiled(
        SOURCE, FLAGS, Library, agrees_with_reference, what="norms, gated units and attention"
    )


def library_for(*tensors: Tensor) -> Library | None:
    """The compiled code if all of these are plain bfloat16 of a CPU, or stand for such ones."""
    for t in tensors:
        if t.dtype != torch.bfloat16 or not (type(t) in _PLAIN or is_fake(t)):
            return None
        if device_type(t) != "cpu":
            return None
    return load()


def rows_of(x: Tensor, *, dense: bool = True) -> Tensor:
    """(..., D) -> (rows, D), copied where rows are uneven or, if need be, apart."""
    rows = x.reshape(-1, x.shape[-1])
    return rows.contiguous() if dense or rows.stride(-1) != 1 else rows


def agrees_with_reference(library: Library) -> bool:
    """Whether a norm, a gated unit, a softmax and attention are what torch makes of them."""
    generator = torch.Generator().manual_seed(0)
    x, up, weight = torch.randn(3, 5, 37, generator=generator).bfloat16()
    y, rstd = library.norm(x, weight[0], 1e-6, False)
    wide = x.float()
    expected = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    pairs = [(rstd, expected), (y, wide * expected * weight[0].float())]
    pairs.append((library.gated(x, up, "silu"), torch.nn.functional.silu(wide) * up.float()))
    scores = x[None, :, :5].float().contiguous()
    masked = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    library.attend_(scores, 1.0)
    pairs.append((scores, masked.softmax(-1)))
    query, key, value, y = torch.randn(4, 1, 2, 5, 37, generator=generator).bfloat16()
    library.attend_documents((query, key, value, y), (0, 5), 0.5)
    attend = torch.nn.functional.scaled_dot_product_attention
    expected = attend(query.float(), key.float(), value.float(), is_causal=True, scale=0.5)
    pairs.append((y, expected))
    return all(torch.allclose(ours.float(), theirs, rtol=2e-2, atol=1e-3) for ours, theirs in pairs)


@lru_cache(maxsize=1024)
def _int64s(*values: int) -> Any:
    """Numbers for code that only reads them."""
    return (_INT64 * len(values))(*values)


def _at(x: Tensor, index: int) -> int:
    """The address of x[index]."""
    return x.data_ptr() + index * x.stride(0) * x.itemsize


def _run(work: Callable[[int, int], None], *tensors: Tensor) -> None:
    """Call `work(first, stop)` on parts of the first dimension, if there are values."""
    x = tensors[0]
    if is_fake(x):
        report_kernel("other", 0, sum(t.nbytes for t in tensors))
        return
    in_parts(work, len(x), least=max(1, VALUES_PER_THREAD * len(x) // max(1, x.numel())))


def _check(status: int) -> None:
    if status:
        raise MemoryError("no memory for a row of scores")
