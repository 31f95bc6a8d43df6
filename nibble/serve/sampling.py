"""How the next token is chosen from its logits."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nibble.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn, and what of it is reported.

    Args:
        max_new_tokens: Longest answer; 0 runs the prompt alone.
        temperature: 0 takes the likeliest token; above, tokens are drawn.
        top_p: Draw among the fewest likeliest tokens that make up this probability, in (0, 1].
        top_k: Draw among so many likeliest tokens; 0 is all.
        seed: Of the draw: the same seed draws the same tokens, whatever else is in the batch.
            None leaves it to chance.
        stop: Texts that end the answer and are not part of it.
        num_logprobs: None: no log-probabilities. n: the token's own and those of the n likeliest.
        of_prompt: Log-probabilities of the tokens of the prompt as well; needs `num_logprobs`.

    Raises:
        UsageError: If a value is out of range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    num_logprobs: int | None = None
    of_prompt: bool = False

    def __post_init__(self) -> None:
        has_logprobs = self.num_logprobs is not None
        expected = {
            "max_new_tokens at least 0": self.max_new_tokens >= 0,
            # NaN compares as false.
            "temperature a number of at least 0": 0 <= self.temperature < float("inf"),
            "top_p above 0 and at most 1": 0 < self.top_p <= 1,
            "top_k at least 0": self.top_k >= 0,
            "seed from 0 to 2**63 - 1": self.seed is None or 0 <= self.seed < 1 << 63,
            "stop texts that are not empty": all(self.stop),
            "num_logprobs at least 0": self.num_logprobs is None or self.num_logprobs >= 0,
            "num_logprobs given where of_prompt is": has_logprobs or not self.of_prompt,
        }
        for what, is_right in expected.items():
            if not is_right:
                value = getattr(self, what.split()[0])
                raise UsageError(f"{what.split()[0]} is {value!r}, expected {what}")


def make_generator(seed: int | None) -> torch.Generator:
    """The source of one answer's draws, on the CPU whatever the model is on."""
    generator = torch.Generator("cpu")
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def choose(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The next token.

    In this order, as transformers does: logits are divided by the temperature, then all but the
    `top_k` likeliest tokens are left out, then all but the fewest that make up `top_p` of what
    is left. Of equal logits the lower id counts as the likelier.

    Args:
        logits_V: Raw logits on the CPU.
    """
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    probabilities_V = probabilities(logits_V, sampling)
    # One uniform number a token, whatever the vocabulary.
    uniform = torch.rand((), dtype=torch.float64, generator=generator)
    sums_V = probabilities_V.cumsum(0)
    token = int(torch.searchsorted(sums_V, uniform * sums_V[-1], right=True))
    return min(token, int(probabilities_V.nonzero()[-1]))


def probabilities(logits_V: Tensor, sampling: Sampling) -> Tensor:
    """The distribution that `choose` draws from, for a temperature above 0; float64."""
    scaled_V = logits_V.double() / sampling.temperature
    is_cut = 0 < sampling.top_k < len(scaled_V) or sampling.top_p < 1
    if not is_cut:
        return scaled_V.softmax(0)
    ordered, order = scaled_V.sort(descending=True, stable=True)
    if 0 < sampling.top_k < len(ordered):
        ordered, order = ordered[: sampling.top_k], order[: sampling.top_k]
    share = ordered.softmax(0)
    if sampling.top_p < 1:
        share[share.cumsum(0) - share >= sampling.top_p] = 0.0
    return torch.zeros_like(scaled_V).index_copy_(0, order, share / share.sum())
