"""Facts per architecture, and the two halves of a causal language model: decoder and head.

    hidden_states(model, batch)     the decoder: token ids -> (T, D)
    head_of(model)                  the head: weight, soft cap and scale of the logits
    head_of(model).logits(hidden)   both together: what `model(...).logits` would be

transformers defines the architectures; nothing here copies one. A decoder-only architecture that
is not listed works where `model.selfcheck` finds that it does.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nibble.errors import ModelError
from nibble.kernels.few_rows import few_rows_product, is_few

_SEPARATE = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class Family:
    """What nibble knows of one architecture.

    Args:
        model_type: The name in config.json.
        title: The name people use.
        decoder: Path of the decoder, which gives hidden states.
        layers: Path of the list of decoder layers.
        groups: Names of linear layers of one block that read the same input.
        experts: Names of the 3-D expert parameters (E, O, I).
        is_first_class: Tested against transformers; otherwise the generic path.
    """

    model_type: str
    title: str
    decoder: str = "model"
    layers: str = "model.layers"
    groups: tuple[tuple[str, ...], ...] = _SEPARATE
    experts: tuple[str, ...] = ()
    is_first_class: bool = True


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "Llama 2 and 3"),
        Family("mistral", "Mistral"),
        Family("falcon", "Falcon", "transformer", "transformer.h", groups=()),
        Family("qwen2", "Qwen2"),
        Family("qwen3", "Qwen3"),
        Family("gemma", "Gemma"),
        Family("gemma2", "Gemma 2"),
        Family("gemma3_text", "Gemma 3 (text)"),
        Family("phi3", "Phi-3", groups=()),
        Family("mixtral", "Mixtral", groups=_SEPARATE[:1], experts=("gate_up_proj", "down_proj")),
        Family("qwen3_moe", "Qwen3-MoE", groups=_SEPARATE, experts=("gate_up_proj", "down_proj")),
    )
}


class PackedRows(Protocol):
    """What a decoder needs of a batch: documents laid end to end, without padding.

    Shapes:
        input_ids, position_ids: (1, T); positions restart at 0 in every document.
        cu_seq_lens: (number of documents + 1,), from 0 to T.
    """

    @property
    def input_ids(self) -> Tensor: ...
    @property
    def position_ids(self) -> Tensor: ...
    @property
    def cu_seq_lens(self) -> Tensor: ...


@dataclass(frozen=True)
class Head:
    """The output layer: logits = cap(logit_scale * hidden weight^T).

    cap(z) = softcap * tanh(z / softcap), or z where `softcap` is None.

    Shapes:
        weight: (V, D).
    """

    weight: Tensor
    softcap: float | None = None
    logit_scale: float = 1.0

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        if is_few(hidden):
            logits = few_rows_product(hidden, self.weight)
        else:
            logits = nn.functional.linear(hidden, self.weight)
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


def family_of(config: Any) -> Family:
    """The facts of the architecture that a transformers config names.

    Raises:
        ModelError: If the variant cannot be trained on packed rows.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        return Family(config.model_type, config.model_type, "", "", (), (), is_first_class=False)
    if getattr(config, "alibi", False):
        raise ModelError(
            f"{family.title} with ALiBi positions is not supported (alibi is true in config.json)",
            fix="use a model with rotary positions, such as Falcon 7B or 40B",
        )
    return family


def decoder_of(model: Any) -> nn.Module:
    """The part of `model` that gives hidden states."""
    return model.get_submodule(family_of(model.config).decoder or model.base_model_prefix)


def decoder_layers(model: Any) -> nn.ModuleList:
    """The list of decoder layers.

    Raises:
        ModelError: If an unlisted architecture has no single list of them.
    """
    family = family_of(model.config)
    if family.layers:
        return model.get_submodule(family.layers)
    count = model.config.num_hidden_layers
    lists = [m for m in decoder_of(model).children() if isinstance(m, nn.ModuleList)]
    found = [layers for layers in lists if len(layers) == count]
    if len(found) != 1:
        raise ModelError(f"cannot find the {count} decoder layers of {family.model_type}")
    return found[0]


class Documents(tuple[int, ...]):
    """Boundaries of documents, which every layer is given, and the tokens that are read.

    Attributes:
        read: Positions, (N,); None is all of them.
    """

    read: Tensor | None

    def __new__(cls, boundaries: Iterable[int], read: Tensor | None = None) -> "Documents":
        documents = super().__new__(cls, boundaries)
        documents.read = read
        return documents


def hidden_states(model: Any, batch: PackedRows, read: Tensor | None = None) -> Tensor:
    """The last hidden state of every token after the final norm, (T, D); no logits.

    The decoder runs without a cache. Every layer is given `documents`, the boundaries as Python
    numbers (one device sync per batch, not per layer), and a mask of one element, which keeps
    transformers from building a (T, T) mask that packed attention does not need.

    Args:
        read: The tokens whose state is needed, (N,); those of others may be wrong.
    """
    documents = Documents(batch.cu_seq_lens.tolist(), read)
    output = decoder_of(model)(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=torch.ones((1, 1, 1, 1), dtype=torch.bool, device=batch.input_ids.device),
        use_cache=False,
        documents=documents,
    )
    return output[0].squeeze(0)


def head_of(model: Any) -> Head:
    """The output layer of `model` with the cap and the scale of its logits.

    Raises:
        ModelError: If the head is not a plain matrix.
    """
    layer = model.get_output_embeddings()
    if layer is None or getattr(layer, "bias", None) is not None:
        raise ModelError(f"the head of {model.config.model_type} is not a matrix without bias")
    config = model.config
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    return Head(layer.weight, getattr(config, "final_logit_softcapping", None), scale)


def supported_names() -> Sequence[str]:
    """The first-class families, for messages."""
    return [family.title for family in FAMILIES.values()]
