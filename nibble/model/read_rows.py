"""The last feed-forward part, for those tokens alone whose hidden state is read.

Of the last layer a loss reads tokens that have a target, and the final norm looks at one token at a
time. What the feed-forward part would add to the others nobody sees; their gradient is zero.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nibble.model.families import decoder_layers
from nibble.model.lean import is_gated_part


def use_read_rows(model: nn.Module) -> None:
    """Let the last layer of a known family look at the tokens that are read, in place."""
    layer = decoder_layers(model)[-1]
    if is_gated_part(getattr(layer, "mlp", None)):
        layer.forward = partial(_last_layer, layer.forward, layer.mlp)


def _last_layer(forward: Callable[..., Any], part: Any, hidden: Tensor, **kwargs: Any) -> Any:
    read = getattr(kwargs.get("documents"), "read", None)
    if read is None:
        return forward(hidden, **kwargs)
    of_all = part.forward
    part.forward = partial(_of_rows, of_all, read)
    try:
        return forward(hidden, **kwargs)
    finally:
        part.forward = of_all


def _of_rows(forward: Callable[[Tensor], Tensor], read: Tensor, x: Tensor) -> Tensor:
    """(1, T, D) -> (1, T, D), zero where nothing is read."""
    y = forward(x.index_select(1, read))
    return torch.zeros_like(x, dtype=y.dtype).index_copy(1, read, y)
