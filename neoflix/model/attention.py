"""GPT-Neo's attention on torch's fast kernels.

It computes the same as transformers' eager attention (no 1/sqrt(d) scaling; every second layer sees only the last
`window_size` tokens), without the [B, H, T, T] fp32 matrix and without the positions-squared `bias` buffer (4 MB per
layer at 2,048 positions). In a packed row, each text attends only to itself (`packed_attention.py`).

All masks of transformers work: two-dimensional, or four-dimensional as bool, float or integer, with any cache.

Shapes: B rows, T tokens per row, Q queries, K keys, H heads, D dimensions per head.
"""

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from neoflix.data.packing import TextLayout
from neoflix.model.packed_attention import attend_by_text, band

ATTENTION_NAME = "neoflix"  # not "sdpa", which transformers refuses for GPT-Neo


class GPTNeoFastAttention(nn.Module):
    """Replaces transformers' `GPTNeoSelfAttention`, with the same weights, arguments and result.

    `attention_mask` may also be the layout of the texts in a packed row (`lay_out_texts`). Attention weights are not
    returned, since the kernels do not keep them.
    """

    def __init__(self, config, attention_type: str, layer_id: int | None = None):
        super().__init__()
        self.layer_id = layer_id
        self.window = config.window_size if attention_type == "local" else None
        self.num_heads = config.num_heads
        self.attention_dropout = float(config.attention_dropout)
        self.resid_dropout = nn.Dropout(float(config.resid_dropout))
        if config.hidden_size % config.num_heads:
            raise ValueError(f"hidden_size {config.hidden_size} is not a multiple of num_heads {config.num_heads}")
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=True)

    def forward(self, hidden_states, attention_mask=None, layer_past=None, output_attentions=False, **kwargs):
        """hidden_states [B, T, H * D] -> (output [B, T, H * D], None)."""
        if output_attentions:
            raise ValueError('output_attentions=True needs a model loaded with attn_implementation="eager"')
        query, key, value = (
            projection(hidden_states).unflatten(-1, (self.num_heads, -1))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if isinstance(attention_mask, TextLayout):
            output = attend_by_text(query[0], key[0], value[0], attention_mask, 1.0, self._dropout, self.window)
        else:
            query, key, value = (x.transpose(1, 2) for x in (query, key, value))
            if attention_mask is not None:  # before the update, which changes the offset of a static cache
                places = _find_places(layer_past, self.layer_id, query.shape[2], query.device)
                attention_mask = self._complete(attention_mask, places, query.dtype)
            if layer_past is not None:
                key, value = layer_past.update(key, value, self.layer_id)
            output = self._attend(query, key, value, attention_mask).transpose(1, 2)
        return self.resid_dropout(self.out_proj(output.reshape(hidden_states.shape))), None

    @property
    def _dropout(self) -> float:
        return self.attention_dropout if self.training else 0.0

    def _complete(self, mask, place_Q1, dtype):
        """The mask for `scaled_dot_product_attention`: causal, and limited to the layer's window.

        Args:
            mask: broadcast to [B, H, Q, K]. Bool: True attends. Float: added to the scores. Integer: 1 attends, 0 does
                not; an integer mask without positive values is added to the scores.
            place_Q1: each query's position among the keys; [B, 1, 1, 1] with our own cache.
        """
        num_queries, num_keys = place_Q1.shape[-2], mask.shape[-1]
        lowest = torch.finfo(dtype).min  # not -inf, with which a row without visible keys is NaN
        if mask.dtype != torch.bool:
            if not mask.is_floating_point():
                shown = torch.where(mask > 0, 0.0, lowest)
                mask = torch.where((mask > 0).any(), shown, mask.to(shown.dtype))
            mask = mask.to(dtype).clamp(min=lowest)
        is_windowed = self.window is not None and num_keys > self.window
        if num_queries == 1 and not is_windowed:  # one new token attends to the whole cache
            return mask
        keys_K = torch.arange(num_keys, device=mask.device)
        is_near = keys_K <= place_Q1
        if is_windowed:
            is_near &= keys_K > place_Q1 - self.window
        return mask & is_near if mask.dtype == torch.bool else mask.masked_fill(~is_near, -torch.inf)

    def _attend(self, query_BHQD, key_BHKD, value_BHKD, mask):
        num_queries = query_BHQD.shape[2]
        if mask is None and num_queries == 1:  # one new token attends to the whole cache
            if self.window is not None:
                key_BHKD, value_BHKD = key_BHKD[:, :, -self.window :], value_BHKD[:, :, -self.window :]
        elif mask is None:  # a prefill: a static cache has empty positions after the queries
            key_BHKD, value_BHKD = key_BHKD[:, :, :num_queries], value_BHKD[:, :, :num_queries]
            if self.window is not None and num_queries > self.window:
                mask = band(num_queries, self.window, query_BHQD.device)
        return scaled_dot_product_attention(
            query_BHQD,
            key_BHKD,
            value_BHKD,
            attn_mask=mask,
            dropout_p=self._dropout,
            is_causal=mask is None and num_queries > 1,
            scale=1.0,
        )


def _find_places(cache, layer: int | None, num_queries: int, device):
    """Each query's position among the keys: [Q, 1]; [B, 1, 1, 1] with a `SlotCache`."""
    if (places_B := getattr(cache, "places_B", None)) is not None:
        return places_B[:, None, None, None]
    if (place_Q1 := getattr(cache, "place_Q1", None)) is not None:  # a `PagedCache`
        return place_Q1
    start = 0 if cache is None else cache.get_query_offset(layer)
    return start + torch.arange(num_queries, device=device).unsqueeze(1)
