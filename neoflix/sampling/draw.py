"""Drawing a token: counter-based noise, temperature, top_k, top_p."""

from dataclasses import dataclass, replace

import torch

MASK_64 = (1 << 64) - 1

CANDIDATES = 1024  # likeliest tokens looked at for top_p; more are needed if their probabilities sum to less than top_p


def _mix(x: torch.Tensor) -> torch.Tensor:
    """splitmix64's finalizer on int64 (arithmetic modulo 2^64): nearby inputs give unrelated outputs.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def _signed(x: int) -> int:
    x &= MASK_64
    return x - (1 << 64) if x >> 63 else x


def stream_keys(seed: int, indices: list[int]) -> torch.Tensor:
    """int64 [B]: the keys of the random streams of texts `indices` of `seed`."""
    return _mix(_mix(torch.tensor([_signed((seed << 32) ^ index) for index in indices])) + 1)


def gumbel_noise(keys_B: torch.Tensor, steps_B: torch.Tensor, tokens_BK: torch.Tensor) -> torch.Tensor:
    """float64 [B, K]: Gumbel noise, a hash of (stream, step, token). It does not depend on the batch."""
    bits_BK = _mix(_mix(keys_B + steps_B).unsqueeze(1) + tokens_BK)
    uniform_BK = (((bits_BK >> 11) & ((1 << 53) - 1)).double() + 0.5) * 2.0**-53
    return -uniform_BK.log().neg().log()


@dataclass(frozen=True)
class Draw:
    """Draws tokens by temperature, then top_k (0: off), then top_p, as `generate` does.

    The token is the argmax of logits + Gumbel noise, which is a draw from their softmax (the Gumbel-max trick,
    https://arxiv.org/abs/1411.0030). top_p does not sort the vocabulary: it looks at the likeliest tokens, whose
    probabilities usually sum to top_p.
    """

    temperature: float
    top_k: int
    top_p: float
    num_candidates: int = CANDIDATES

    def wider(self) -> "Draw":
        """The same draw from eight times as many candidates."""
        return replace(self, num_candidates=8 * self.num_candidates)

    def __call__(
        self, logits_BV: torch.Tensor, keys_B: torch.Tensor, steps_B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (tokens [B], whether each needs more candidates to be known, bool [B])."""
        num_tokens = logits_BV.shape[1]
        logits_BV = logits_BV.float()
        logits_BV = logits_BV / self.temperature if self.temperature != 1 else logits_BV
        count = min(self.top_k or (self.num_candidates if self.top_p < 1 else num_tokens), num_tokens)
        if count < num_tokens or self.top_p < 1:
            scores_BK, tokens_BK = logits_BV.topk(count)
        else:
            scores_BK, tokens_BK = logits_BV, torch.arange(num_tokens, device=logits_BV.device).expand_as(logits_BV)
        is_short_B = torch.zeros_like(steps_B, dtype=torch.bool)
        if self.top_p < 1:
            if self.top_k:
                shares_BK = scores_BK.softmax(-1)
            else:
                shares_BK = logits_BV.softmax(-1).gather(1, tokens_BK)
                if count < num_tokens:
                    is_short_B = shares_BK.sum(-1) < self.top_p
            likelier_BK = shares_BK.cumsum(-1) - shares_BK  # sum of the probabilities before this token
            likelier_BK[:, 0] = 0
            scores_BK = scores_BK.masked_fill(likelier_BK >= self.top_p, float("-inf"))
        best_B1 = (scores_BK + gumbel_noise(keys_B, steps_B, tokens_BK)).argmax(-1, keepdim=True)
        return tokens_BK.gather(1, best_B1).squeeze(1), is_short_B

    def settled(self, logits_BV: torch.Tensor, keys_B: torch.Tensor, steps_B: torch.Tensor) -> torch.Tensor:
        """Tokens [B], from as many candidates as needed. Waits for the device."""
        draw = self
        tokens_B, is_short_B = draw(logits_BV, keys_B, steps_B)
        while is_short_B.any():
            draw, short = draw.wider(), is_short_B.nonzero().squeeze(1)
            tokens_B[short], is_short_B[short] = draw(logits_BV[short], keys_B[short], steps_B[short])
        return tokens_B
