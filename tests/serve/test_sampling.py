"""The draw follows the distribution that transformers' filters leave."""

import pytest
import torch

from nibble.errors import UsageError
from nibble.serve.sampling import Sampling, choose, make_generator, probabilities


@pytest.mark.parametrize("temperature", [0.5, 1.3])
@pytest.mark.parametrize("top_k", [0, 1, 7, 1000])
@pytest.mark.parametrize("top_p", [0.05, 0.6, 1.0])
def test_the_distribution_is_that_of_transformers(temperature, top_k, top_p):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    found = probabilities(logits[0], Sampling(temperature=temperature, top_k=top_k, top_p=top_p))
    torch.testing.assert_close(found, expected[0].softmax(0))


def test_the_draw_follows_the_distribution():
    logits = torch.tensor([0.0, 1.0, -torch.inf, 2.0])
    generator, sampling = make_generator(0), Sampling(temperature=1.0)
    drawn = [choose(logits, sampling, generator) for _ in range(4000)]
    shares = torch.tensor(drawn).bincount(minlength=4) / 4000
    torch.testing.assert_close(shares, logits.softmax(0), atol=0.03, rtol=0)
    assert shares[2] == 0


def test_temperature_zero_takes_the_likeliest():
    assert choose(torch.tensor([1.0, 3.0, 2.0]), Sampling(), make_generator(0)) == 1


def test_a_seed_repeats_the_draw():
    logits, sampling = torch.zeros(1000), Sampling(temperature=1.0)
    first, second, other = (
        [choose(logits, sampling, generator) for _ in range(5)]
        for generator in map(make_generator, (1, 1, 2))
    )
    assert first == second
    assert first != other


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -1.0}, {"temperature": float("nan")}, {"temperature": float("inf")},
        {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}, {"max_new_tokens": -1}, {"stop": ("",)},
        {"num_logprobs": -1}, {"of_prompt": True}, {"seed": -1}, {"seed": 1 << 63},
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(values):
    with pytest.raises(UsageError, match=next(iter(values))):
        Sampling(**values)
