"""GPT-Neo with our attention in transformers' continuous batching (`generate_batch`).

transformers calls a model with one row of all new tokens, a block-diagonal mask and a paged cache. Its GPT-Neo drops
the cache, and its list of attention names lacks ours. So it gets the model in a `PagedModel`, which goes by "sdpa" and
passes the cache on as `past_key_values`. The cache keeps all tokens of each layer; our attention leaves out those
outside a local layer's window.

Shapes: Q new tokens of all texts, K tokens of all texts, H heads, D dimensions per head.
"""

import copy

import torch
from torch import nn
from transformers.generation.continuous_batching import ContinuousBatchingManager, ContinuousMixin
from transformers.generation.continuous_batching.cache_allocators import FULL_ATTENTION

from neoflix.model.attention import ATTENTION_NAME

MANAGER = "_cached_continuous_batching_manager"  # where transformers keeps it for the next call


class PagedCache:
    """The paged cache in one step, with a cache's `update`.

    Args:
        step: transformers' `PagedAttentionArgs`.

    Attributes:
        place_Q1: each new token's position among the keys of all texts.
    """

    def __init__(self, step: dict):
        self.step = step
        ends_q, ends_k = step["cu_seq_lens_q"][1:], step["cu_seq_lens_k"][FULL_ATTENTION][1:]
        queries_Q = torch.arange(step["num_queries"], dtype=ends_q.dtype, device=ends_q.device)
        texts_Q = torch.searchsorted(ends_q, queries_Q, right=True).clamp(max=len(ends_q) - 1)  # the rest is padding
        self.place_Q1 = (ends_k[texts_Q] - ends_q[texts_Q] + queries_Q).unsqueeze(1)

    def update(self, key_1HQD, value_1HQD, layer: int):
        """-> keys and values [1, H, K, D], the new ones included."""
        return self.step["cache"].update(key_1HQD, value_1HQD, layer, dict(self.step))  # it changes the dict


class PagedModel(nn.Module):
    """The model as transformers' continuous batching calls it. Every other attribute is the model's."""

    _supports_flash_attn = False  # else transformers takes flash attention where that is installed

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.config = copy.deepcopy(model.config)
        self.config._attn_implementation = "sdpa"

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def __setattr__(self, name: str, value) -> None:
        if name == MANAGER:
            setattr(self.model, name, value)
        else:
            super().__setattr__(name, value)

    def forward(self, input_ids, position_ids, attention_mask, logits_to_keep=0, **step):
        step["num_queries"] = input_ids.shape[1]
        return self.model(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            past_key_values=PagedCache(step),
            use_cache=False,  # no other cache
            logits_to_keep=logits_to_keep,
        )


def init_continuous_batching(model, *args, **kwargs) -> ContinuousBatchingManager:
    """transformers' method of this name, which `generate_batch` calls, for a GPT-Neo with any attention."""
    paged = PagedModel(model) if model.config._attn_implementation == ATTENTION_NAME else model
    return ContinuousMixin.init_continuous_batching(paged, *args, **kwargs)
