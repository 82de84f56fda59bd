"""GPT-Neo's attention on torch's `scaled_dot_product_attention`.

The same function as transformers' eager attention (no 1/sqrt(d) scaling; every other layer sees only the
last `window_size` tokens), without its [B, H, T, T] fp32 matrix and without its position-squared `bias`
buffer (4 MB a layer at 2,048 positions). Rows that hold several texts end to end (`position_ids` that
restart) are taken apart inside attention and attended to text by text: exact, and linear in the number
of texts where a block-diagonal mask would be quadratic.

Shapes: B rows, T tokens a row, Q queries, K keys, H heads, D dimensions a head, N texts, L tokens of the
longest text in a group.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt_neo.modeling_gpt_neo import GPT_NEO_ATTENTION_CLASSES

# Not "sdpa": transformers refuses that word for GPT-Neo, and its mask for packed rows is dense.
ATTENTION_NAME = "neoflix"

SHORTEST_GROUP = 16  # texts up to this length share a group: below it padding costs less than another kernel


class PackedTexts(NamedTuple):
    """Where the texts lie in packed rows, and how to come back.

    `groups`: one LongTensor [N, L] for each power-of-two length class: indices into the B * T flattened
    tokens; beyond its end a text repeats its last token, which causal attention keeps from mattering.
    `places`: where each flattened token stands in the groups' outputs laid end to end, LongTensor [B * T].
    """

    groups: tuple[torch.Tensor, ...]
    places: torch.Tensor


def locate_texts(is_start_BT: torch.Tensor) -> PackedTexts:
    """Groups the texts of packed rows by length.

    Args:
        is_start_BT: bool [B, T], True at the first token of each text; the first column is True.
    """
    is_start_BT = is_start_BT.flatten()
    num_tokens = is_start_BT.numel()
    starts_N = is_start_BT.nonzero().squeeze(1)
    lengths_N = torch.diff(starts_N, append=starts_N.new_tensor([num_tokens]))
    class_N = lengths_N.clamp(min=SHORTEST_GROUP).sub(1).log2().floor()
    groups, places, offset = [], torch.empty_like(is_start_BT, dtype=torch.long), 0
    for length_class in class_N.unique():
        members = class_N == length_class
        lengths_N1 = lengths_N[members].unsqueeze(1)
        steps_L = torch.arange(int(lengths_N1.max()), device=lengths_N1.device)
        group_NL = starts_N[members].unsqueeze(1) + steps_L.minimum(lengths_N1 - 1)
        is_real_NL = steps_L < lengths_N1
        slots_NL = torch.arange(offset, offset + group_NL.numel(), device=group_NL.device).view_as(group_NL)
        places[group_NL[is_real_NL]] = slots_NL[is_real_NL]
        groups.append(group_NL)
        offset += group_NL.numel()
    return PackedTexts(tuple(groups), places)


def attention_mask(batch_size, q_length, kv_length, mask_function, **kwargs):
    """What every layer is told about a batch; transformers calls this once a forward pass.

    Returns None (plain causal), a bool [B, 1, Q, K] mask (padding or a cache), or `PackedTexts`.
    transformers hands no `position_ids` on, only a function that says which key a query may see. In packed
    rows a token that may not see the one before it is the first of its text.
    """
    is_packed = (
        kwargs.get("attention_mask") is None
        and q_length == kv_length > 1
        and not kwargs.get("allow_is_causal_skip", True)
        and not kwargs.get("use_vmap", False)
    )
    if not is_packed:
        return sdpa_mask(batch_size, q_length, kv_length, mask_function=mask_function, **kwargs)
    device = kwargs.get("device", "cpu")
    rows_B1 = torch.arange(batch_size, device=device).unsqueeze(1)
    tokens_1T = torch.arange(1, q_length, device=device).unsqueeze(0)
    sees_previous = mask_function(rows_B1, torch.zeros_like(rows_B1), tokens_1T, tokens_1T - 1)
    return locate_texts(nn.functional.pad(~sees_previous.expand(batch_size, -1), (1, 0), value=True))


class GPTNeoFastAttention(nn.Module):
    """Takes the place of transformers' `GPTNeoSelfAttention`: same weights, same call, same result.

    `attn_weights` is always None: no kernel that is worth using keeps them.
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

    def forward(self, hidden_states, attention_mask=None, layer_past=None, **kwargs):
        """hidden_states [B, T, H * D] -> (output [B, T, H * D], None)."""
        query, key, value = (
            projection(hidden_states).unflatten(-1, (self.num_heads, -1))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if isinstance(attention_mask, PackedTexts):
            output = self._attend_by_text(query, key, value, attention_mask)
        else:
            query, key, value = (x.transpose(1, 2) for x in (query, key, value))
            if layer_past is not None:
                key, value = layer_past.update(key, value, self.layer_id)
            output = self._attend(query, key, value, attention_mask).transpose(1, 2)
        return self.resid_dropout(self.out_proj(output.reshape(hidden_states.shape))), None

    def _attend_by_text(self, query_BTHD, key_BTHD, value_BTHD, texts: PackedTexts):
        flat = [x.flatten(0, 1) for x in (query_BTHD, key_BTHD, value_BTHD)]
        outputs = []
        for group_NL in texts.groups:
            query, key, value = (x[group_NL].transpose(1, 2) for x in flat)
            outputs.append(self._attend(query, key, value, None).transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs)[texts.places]

    def _attend(self, query_BHQD, key_BHKD, value_BHKD, mask):
        num_queries = query_BHQD.shape[2]
        if mask is None and num_queries == 1:  # one new token that sees all of the cache
            if self.window is not None:
                key_BHKD, value_BHKD = key_BHKD[:, :, -self.window :], value_BHKD[:, :, -self.window :]
        elif mask is None:  # nothing cached yet: a static cache has empty places beyond the queries
            key_BHKD, value_BHKD = key_BHKD[:, :, :num_queries], value_BHKD[:, :, :num_queries]
            if self.window is not None and num_queries > self.window:
                mask = _band(num_queries, self.window, query_BHQD.device)
        elif self.window is not None and key_BHKD.shape[2] > self.window:
            mask = mask & _within_window(mask, self.window)
        return scaled_dot_product_attention(
            query_BHQD,
            key_BHKD,
            value_BHKD,
            attn_mask=mask,
            dropout_p=self.attention_dropout if self.training else 0.0,
            is_causal=mask is None and num_queries > 1,
            scale=1.0,
        )


def _band(length: int, window: int, device) -> torch.Tensor:
    """bool [length, length]: each token sees itself and the window - 1 tokens before it."""
    full = torch.ones(length, length, dtype=torch.bool, device=device)
    return full.tril().triu(1 - window)


def _within_window(mask_B1QK: torch.Tensor, window: int) -> torch.Tensor:
    """bool [B, 1, Q, K]: the last `window` keys up to each query, whose own place is its last visible key."""
    keys_K = torch.arange(mask_B1QK.shape[-1], device=mask_B1QK.device)
    query_place = (mask_B1QK * keys_K).amax(-1, keepdim=True)
    return keys_K > query_place - window


def register_attention() -> None:
    """Makes `attn_implementation="neoflix"` known to transformers; may be called again."""
    GPT_NEO_ATTENTION_CLASSES[ATTENTION_NAME] = GPTNeoFastAttention
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, attention_mask)
    # Only so that the name passes transformers' check: GPT-Neo builds its layers from the table above.
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, scaled_dot_product_attention)
