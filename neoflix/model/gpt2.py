"""A GPT-Neo as a GPT-2: its config and its weights.

The two are the same network except for this:

- GPT-2 divides attention scores by sqrt(head width), GPT-Neo does not. The query weights are multiplied by it here.
- GPT-2 has biases for queries, keys and values. They become zeros.
- In every second layer, GPT-Neo attends only to the last 256 tokens (its window), and GPT-2 to all. Up to 256 tokens
  there is no difference, so the GPT-2 has 256 positions.

Sources: transformers' modeling_gpt_neo.py and modeling_gpt2.py.
"""

import math
from collections.abc import Iterator

import torch
from transformers import GPT2Config, GPTNeoConfig


def context_limit(config: GPTNeoConfig) -> int:
    """The most tokens, prompt included, for which GPT-2's attention equals this GPT-Neo's."""
    if "local" in config.attention_layers:
        return min(config.window_size, config.max_position_embeddings)
    return config.max_position_embeddings


def gpt2_config(config: GPTNeoConfig, vocab_size: int, dtype: torch.dtype) -> GPT2Config:
    """GPT-2's config for a GPT-Neo, with `context_limit` positions.

    Args:
        vocab_size: the tokenizer's. Rows beyond it belong to no token, and some engines refuse them.
    """
    limit = context_limit(config)
    return GPT2Config(
        vocab_size=vocab_size,
        n_positions=limit,
        n_ctx=limit,  # the name that llama.cpp's converter reads
        n_embd=config.hidden_size,
        n_layer=config.num_layers,
        n_head=config.num_heads,
        n_inner=config.intermediate_size,
        activation_function=config.activation_function,
        resid_pdrop=config.resid_dropout,
        embd_pdrop=config.embed_dropout,
        attn_pdrop=config.attention_dropout,
        layer_norm_epsilon=config.layer_norm_epsilon,
        initializer_range=config.initializer_range,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        tie_word_embeddings=config.tie_word_embeddings,
        architectures=["GPT2LMHeadModel"],
        dtype=dtype,
        exported_from={
            "model_type": config.model_type,
            "max_position_embeddings": config.max_position_embeddings,
            "exact_up_to_tokens": limit,
        },
    )


def limit_of(config: GPTNeoConfig) -> str:
    """A sentence on the positions that were left out; empty if there are none."""
    limit = context_limit(config)
    if limit == config.max_position_embeddings:
        return ""
    return (
        f"Longer texts would be wrong: GPT-Neo's local layers attend to the last {config.window_size} tokens, GPT-2's "
        f"to all. The other {config.max_position_embeddings - limit:,} positions are left out, so no engine uses them."
    )


def rounding_of(config: GPTNeoConfig, dtype: torch.dtype) -> str:
    """A sentence on the rounding of the scaled queries; empty if it is exact (a power of two), or in float32."""
    scale = math.sqrt(config.hidden_size // config.num_heads)
    if dtype == torch.float32 or math.log2(scale).is_integer():
        return ""
    return (
        f"The queries' weights, scaled by {scale:.4g}, were rounded to {name_of(dtype)}; --dtype float32 avoids that."
    )


def name_of(dtype: torch.dtype) -> str:
    """A dtype's name as `--dtype` has it."""
    return str(dtype).removeprefix("torch.")


def rewrite(weights: dict[str, torch.Tensor], config: GPTNeoConfig, gpt2: GPT2Config) -> Iterator:
    """Yields (name, tensor) of the GPT-2's weights, made from the GPT-Neo's.

    GPT-2's linear layers (transformers' Conv1D) have transposed weights, and queries, keys and values are one matrix
    [width, 3 width].
    """
    yield "transformer.wte.weight", weights["transformer.wte.weight"][: gpt2.vocab_size]
    yield "transformer.wpe.weight", weights["transformer.wpe.weight"][: gpt2.n_positions]
    for number in range(config.num_layers):
        layer = f"transformer.h.{number}."
        query, key, value = (weights[f"{layer}attn.attention.{name}_proj.weight"].float() for name in "qkv")
        query = query * math.sqrt(config.hidden_size // config.num_heads)
        yield f"{layer}attn.c_attn.weight", torch.cat([query, key, value]).t()
        yield f"{layer}attn.c_attn.bias", query.new_zeros(3 * config.hidden_size)
        yield f"{layer}attn.c_proj.weight", weights[f"{layer}attn.attention.out_proj.weight"].t()
        yield f"{layer}attn.c_proj.bias", weights[f"{layer}attn.attention.out_proj.bias"]
        for name in ("c_fc", "c_proj"):
            yield f"{layer}mlp.{name}.weight", weights[f"{layer}mlp.{name}.weight"].t()
            yield f"{layer}mlp.{name}.bias", weights[f"{layer}mlp.{name}.bias"]
        for name in ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"):
            yield layer + name, weights[layer + name]
    for name in ("transformer.ln_f.weight", "transformer.ln_f.bias"):
        yield name, weights[name]
    if not gpt2.tie_word_embeddings:
        yield "lm_head.weight", weights["lm_head.weight"][: gpt2.vocab_size]
