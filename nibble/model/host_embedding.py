"""Token embeddings that stay in host memory: what a batch needs of them is sent to the device."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from nibble.errors import UsageError
from nibble.kernels.target import host_empty


class HostEmbedding(nn.Module):
    """Rows of a frozen table, looked up on the host.

    Shapes:
        ids: (...) on any device -> (..., D) on that device. weight: (V, D).
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids.to(self.weight.device), self.weight).to(ids.device)


def keep_embeddings_on_host(model: Any) -> None:
    """Give a model without weights an embedding table in host memory, in place.

    Raises:
        UsageError: If the head is the same table, or the embedding does more than look up.
    """
    config, embedding = model.config, model.get_input_embeddings()
    if config.tie_word_embeddings or type(embedding) is not nn.Embedding:
        raise UsageError(
            f"model.embeddings=host: {config.model_type} needs its embeddings on the device",
            fix="use model.embeddings=device",
        )
    table = host_empty(*embedding.weight.shape, dtype=embedding.weight.dtype)
    name = next(n for n, module in model.named_modules() if module is embedding)
    model.set_submodule(name, HostEmbedding(table))
