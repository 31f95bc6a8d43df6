"""Is this model what nibble takes it for?

    packing    [a a a | b b b b b] in one row  =  [a a a] and [b b b b b], each alone
    head       head(decoder(a))  =  the logits that transformers computes

The first-class families are tested; every other architecture is asked when it is loaded.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nibble.errors import ModelError, NibbleError
from nibble.model.families import head_of, hidden_states

_LENGTHS = (3, 5)
_FIX = "use one of the first-class families"


@dataclass(frozen=True)
class Difference:
    """Largest relative differences found; rounding alone gives some 1e-6 in float32."""

    packing: float
    head: float


@dataclass(frozen=True)
class _Documents:
    input_ids: Tensor
    position_ids: Tensor
    cu_seq_lens: Tensor


@torch.no_grad()
def check_model(model: Any) -> Difference:
    """Compare packed documents with single ones, and our head with transformers' logits.

    Raises:
        ModelError: If a difference is more than rounding explains, or the model does not run.
    """
    was_training = model.training
    model.eval()
    try:
        found = _measure(model)
    except NibbleError:
        raise
    except Exception as error:  # whatever a model raises that calls its parts in another way
        raise ModelError(
            f"{model.config.model_type!r} does not run on packed documents: {error}", fix=_FIX
        ) from error
    finally:
        model.train(was_training)
    tolerance = 1e-4 if model.dtype == torch.float32 else 0.05
    # Written so that NaN fails as well.
    if not found.packing <= tolerance:
        what = "lets packed documents see one another"
    elif not found.head <= tolerance:
        what = "makes logits from hidden states in a way that nibble does not know"
    else:
        return found
    raise ModelError(
        f"{model.config.model_type!r} {what} ({found}, expected at most {tolerance:g})", fix=_FIX
    )


def _measure(model: Any) -> Difference:
    embeddings = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    parts = [
        torch.randint(embeddings.shape[0], (1, length), generator=generator).to(embeddings.device)
        for length in _LENGTHS
    ]
    together = hidden_states(model, _join(parts))
    alone = torch.cat([hidden_states(model, _join([part])) for part in parts])
    expected = model(input_ids=parts[0], use_cache=False).logits[0]
    logits = head_of(model).logits(alone[: _LENGTHS[0]])
    return Difference(_relative(together, alone), _relative(logits, expected))


def _join(parts: list[Tensor]) -> _Documents:
    ends = torch.tensor([0, *(part.shape[1] for part in parts)]).cumsum(0)
    positions = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
    ids = torch.cat(parts, 1)
    return _Documents(ids, positions.to(ids.device), ends.to(torch.int32))


def _relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).float().norm() / theirs.float().norm())
