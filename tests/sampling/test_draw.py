"""Tokens are drawn from the right distribution, from a random stream for each text."""

import pytest
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from neoflix.sampling.draw import Draw, stream_keys


def draws(seed: int, num: int, logits: torch.Tensor, step: int = 0, **settings) -> torch.Tensor:
    draw = Draw(**({"temperature": 1.0, "top_k": 0, "top_p": 1.0} | settings))
    tokens, _ = draw(logits.expand(num, -1), stream_keys(seed, list(range(num))), torch.full((num,), step))
    return tokens


@pytest.mark.parametrize("step", [0, 1, 57])
def test_noise_draws_from_the_softmax(step):
    """Chi-square over 7 degrees of freedom; 24.3 is exceeded once in 1,000 by chance. The seed is fixed."""
    logits = torch.tensor([3.0, 2.5, 2.0, 1.0, 0.5, 0.0, -1.0, -2.0])
    num = 40_000
    seen = torch.bincount(draws(11, num, logits, step), minlength=8)
    expected = logits.softmax(-1) * num
    assert ((seen - expected) ** 2 / expected).sum() < 24.3


def test_streams_steps_and_seeds_are_unrelated():
    flat = torch.zeros(1000)
    by_seed = [draws(seed, 500, flat, step) for seed in (1, 2) for step in (0, 1)]
    for i, one in enumerate(by_seed):
        assert one.unique().numel() > 350  # 500 draws of 1,000 give 394 different ones on average
        for other in by_seed[i + 1 :]:
            assert (one == other).sum() < 10


def test_impossible_tokens_stay_impossible():
    logits = torch.full((50,), float("-inf"))
    logits[7] = 0.0
    assert (draws(3, 200, logits) == 7).all()


SETTINGS = [(1.0, 0, 0.9), (0.7, 0, 0.5), (1.0, 20, 1.0), (1.3, 40, 0.8), (1.0, 0, 1.0), (4.0, 0, 0.95)]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS)
def test_draws_are_from_what_transformers_leaves(temperature, top_k, top_p):
    """Chi-square of 40,000 draws against transformers' own filters, and nothing that they leave out."""
    torch.manual_seed(3)
    logits_1V = 2 * torch.randn(1, 300)
    left_1V = logits_1V / temperature
    left_1V = TopKLogitsWarper(top_k)(None, left_1V) if top_k else left_1V
    left_1V = TopPLogitsWarper(top_p)(None, left_1V) if top_p < 1 else left_1V
    num = 40_000
    expected = left_1V.softmax(-1)[0] * num
    keys = stream_keys(5, list(range(num)))
    for count in (8, 1024):  # candidates: too few for most of these, and all of them
        draw = Draw(temperature, top_k, top_p, count)
        tokens, is_short = draw(logits_1V.expand(num, -1), keys, torch.zeros(num, dtype=torch.long))
        while is_short.any():
            assert top_p < 1
            draw = draw.wider()
            tokens, is_short = draw(logits_1V.expand(num, -1), keys, torch.zeros(num, dtype=torch.long))
        seen = torch.bincount(tokens, minlength=300)
        assert not seen[expected == 0].any()
        often = expected > 5
        freedom = int(often.sum()) - 1
        squares = ((seen - expected) ** 2 / expected)[often].sum()
        assert squares < freedom + 4 * (2 * freedom) ** 0.5  # four deviations; the seed is fixed
