"""A frozen base in shards: a rank keeps its part of every weight, and gathers a layer to use it.

    at rest      1/N of every weight on each of N ranks
    in a pass    the layer at work whole; embeddings, last norm and head from start to end

Weights of every type are gathered as the bytes that they are: bfloat16, float32, the codes and
scales of 4 bits. Trained factors stay whole on every rank. Every rank has to make the same passes.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nibble.model.families import decoder_layers
from nibble.model.host_embedding import HostEmbedding

Result = TypeVar("Result")
_MARK = "is_in_shards"


def shard(model: Any, device: torch.device) -> None:
    """Cut the frozen parameters of `model` in place, over all ranks of the process group.

    Args:
        device: Where the parts go; the model may be elsewhere, then it is moved layer by layer.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.distributed_c10d import get_world_size
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (get_world_size(),))
    whole = {p for p in model.parameters() if p.requires_grad}
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    hosts = [m for m in model.modules() if isinstance(m, HostEmbedding)]
    whole |= {p for host in hosts for p in host.parameters()}
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, ignored_params=whole)
    fully_shard(model, mesh=mesh, ignored_params=whole)

    def forward(function: Callable[..., Result], *args: Any) -> Result:
        return function(model, *args)

    # What stands around a pass has to see all of it: loss and head too, not only the decoder.
    model.forward = forward
    setattr(model, _MARK, True)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was called."""
    return getattr(model, _MARK, False)


def within(model: Any, function: Callable[..., Result], *args: Any) -> Result:
    """function(model, *args), in which the weights of `model` may be used outside of its parts."""
    return model(function, *args) if is_sharded(model) else function(model, *args)


def own_part(tensor: Tensor) -> Tensor:
    """What of a parameter is on this rank: a part, or all of it."""
    return getattr(tensor, "_local_tensor", tensor)
