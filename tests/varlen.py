"""torch's `varlen_attn` on a CPU, so that the code around the CUDA kernel is tested with numbers.

Shapes: T tokens, H heads, D dimensions of a head, N texts.
"""

import torch

HALF = (torch.float16, torch.bfloat16)


def reference_varlen_attn(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
    dtypes=HALF,
):
    """Attends text by text, as torch documents it, in fp32. Query, key, value and result: [T, H, D].

    It refuses what the kernel refuses (the checks of `mha_varlen_fwd` in torch's flash_api.cpp), and bounds that are
    not those of texts, with which the kernel would read or leave out other memory without a word.

    Args:
        dtypes: those of the inputs. The kernel takes half precision only; fp32 shows errors that rounding would hide.
    """
    assert (return_aux, seqused_k, block_table, num_splits) == (None, None, None, None)
    num_tokens, num_heads, width = query.shape
    assert enable_gqa or key.shape[1] == num_heads
    assert query.dtype in dtypes
    assert width % 8 == 0
    assert width <= 256
    for x in (query, key, value):
        assert (x.shape[::2], x.dtype, x.device) == (query.shape[::2], query.dtype, query.device)
        assert x.stride(-1) == 1
    for bounds in (cu_seq_q, cu_seq_k):
        assert (bounds.dtype, bounds.device, bounds.dim()) == (torch.int32, query.device, 1)
        assert bounds.is_contiguous()
    bounds, lengths = cu_seq_q.tolist(), cu_seq_q.diff().tolist()
    assert bounds == cu_seq_k.tolist()
    assert (bounds[0], bounds[-1]) == (0, num_tokens)
    assert min(lengths) > 0
    assert max_q == max_k == max(lengths)
    assert type(window_size) is tuple  # torch compares it with (-1, 0)
    key, value = (x.repeat_interleave(num_heads // x.shape[1], dim=1) for x in (key, value))
    texts = zip(*(x.float().split(lengths) for x in (query, key, value)), strict=True)
    scale = width**-0.5 if scale is None else scale
    return torch.cat([_attend(*text, scale, *window_size) for text in texts]).to(query.dtype)


def _attend(query, key, value, scale: float, left: int, right: int):
    """A text: each token attends to `left` tokens before it and `right` after it; -1 is all."""
    places = torch.arange(len(query), device=query.device)
    distance = places.unsqueeze(1) - places
    is_visible = ((left == -1) | (distance <= left)) & ((right == -1) | (distance >= -right))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~is_visible, -torch.inf).softmax(-1), value)
