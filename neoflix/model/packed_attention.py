"""Attention in a packed row: each text attends only to itself.

The cost is linear in the number of texts; with a block-diagonal mask it would be quadratic. On CUDA this is one kernel,
torch's variable-length flash attention. Elsewhere texts are grouped by length, and each group goes through
`scaled_dot_product_attention`.

Shapes: T tokens of the row, H heads, G heads of keys and values, D dimensions per head, N texts, L tokens of the
longest text (in a group).
"""

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from neoflix.data.packing import TextLayout


def attend_by_text_or_mask(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, sliding_window=None, **kwargs
):
    """An attention function of transformers (`ALL_ATTENTION_FUNCTIONS`): for a packed row `attend_by_text`, for a mask
    transformers' own for `scaled_dot_product_attention`.

    Args:
        query: [1, H, T, D]; key and value [1, G, T, D].
        attention_mask: the layout of the texts (`lay_out_texts`), or any mask.

    Returns:
        ([1, T, H, D], None)
    """
    if not isinstance(attention_mask, TextLayout):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    by_token = (states[0].transpose(0, 1) for states in (query, key, value))
    return attend_by_text(*by_token, attention_mask, scaling, dropout, sliding_window)[None], None


@torch.compiler.disable  # the shapes change with every batch
def attend_by_text(
    query_THD, key_TGD, value_TGD, layout_11NL: TextLayout, scale: float | None, dropout: float, window: int | None
) -> torch.Tensor:
    """-> [T, H, D]

    Args:
        scale: factor of the scores; None for 1/sqrt(D).
        window: number of tokens that a token attends to, itself included; None for all before it.
    """
    is_grouped = query_THD.shape[1] != key_TGD.shape[1]
    if not dropout and takes_varlen(query_THD):
        layout_NL = layout_11NL.as_subclass(torch.Tensor)[0, 0]
        bounds = pad(layout_NL[:, 0], (0, 1), value=len(query_THD)).int()
        return varlen_attn(
            *(query_THD, key_TGD, value_TGD, bounds, bounds, layout_NL.shape[1], layout_NL.shape[1]),
            scale=scale,
            window_size=(-1 if window is None else window - 1, 0),
            enable_gqa=is_grouped,
        )
    output_THD = torch.empty_like(query_THD)
    for group_NL, places_M, cells_M in layout_11NL.groups:
        longest = group_NL.shape[1]
        mask = band(longest, window, query_THD.device) if window is not None and longest > window else None
        attended = scaled_dot_product_attention(
            *(states[group_NL].transpose(1, 2) for states in (query_THD, key_TGD, value_TGD)),
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None and longest > 1,
            scale=scale,
            enable_gqa=is_grouped,
        )
        output_THD[places_M] = attended.transpose(1, 2).flatten(0, 1)[cells_M]
    return output_THD


def takes_varlen(query: torch.Tensor) -> bool:
    """Whether flash attention runs: in half precision, on NVIDIA's Ampere or later, with heads of 8, 16, ..., 256
    dimensions."""
    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    width = query.shape[-1]
    return width % 8 == 0 and width <= 256 and torch.cuda.get_device_capability(query.device) >= (8, 0)


def band(length: int, window: int, device) -> torch.Tensor:
    """bool [length, length]: each token attends to itself and the window - 1 tokens before it."""
    full = torch.ones(length, length, dtype=torch.bool, device=device)
    return full.tril().triu(1 - window)
