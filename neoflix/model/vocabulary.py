"""A model's vocabulary: rows for new tokens, token ids, the window."""

from contextlib import nullcontext

import torch
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import is_deepspeed_zero3_enabled

from neoflix.data.tokenizer import find_added_ids
from neoflix.model.attention import ATTENTION_NAME

# What configs call the longest text; those that map n_positions to max_position_embeddings have it under that name too.
WINDOW_NAMES = ("max_position_embeddings", "max_seq_len", "seq_length", "context_length")


VOCAB_MULTIPLE = 64  # matrix sizes that tensor cores take without a remainder


def _padded(vocab_size: int) -> int:
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def resize_embeddings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, base: str, fills_spare_rows: bool = True
) -> None:
    """Grows the vocabulary to the tokenizer's, rounded up to a multiple of 64, and fills the rows of new tokens.

    Many models have spare rows, which their own tokenizer does not use and nothing has trained: new tokens may lie
    there. A new beginning token starts as a copy of the end token: GPT-Neo was trained on documents set apart by
    `<|endoftext|>`, so it already knows what comes after one. Every other new row starts as the mean row: a
    logit in the middle of all others, never a likely word. (An untouched random row would do neither, and in
    fp16 could overflow.)

    Args:
        base: hub name or folder that the model came from, whose tokenizer says which tokens are new.
        fills_spare_rows: False leaves the model's own rows, and the head's bias, as they were.
    """
    old_size = model.get_input_embeddings().num_embeddings
    new_size = _padded(max(len(tokenizer), old_size))
    if new_size != old_size:
        model.resize_token_embeddings(new_size, mean_resizing=False)
    new = set(range(old_size, new_size))
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    weights = [layer.weight for layer in layers]
    if fills_spare_rows:
        new |= find_added_ids(tokenizer, base)
        model.filled_spare_rows = min(new, default=old_size) < old_size
        weights += [layer.bias for layer in layers if getattr(layer, "bias", None) is not None]
    if not new:
        return
    for weight in {id(weight): weight for weight in weights}.values():
        with _gathered(weight), torch.no_grad():
            if weight.numel() == 0:  # ZeRO-3: only the modifying rank holds the rows
                continue
            weight[sorted(new)] = weight[:old_size].float().mean(0).to(weight.dtype)
            if tokenizer.bos_token_id in new:
                weight[tokenizer.bos_token_id] = weight[tokenizer.eos_token_id]


def _gathered(weight: torch.Tensor):
    """A context in which ZeRO-3's rank 0 holds all of a weight, and may change it."""
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed  # seconds to import, and sampling never comes here

    return deepspeed.zero.GatheredParameters(weight, modifier_rank=0)


def set_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: dict) -> None:
    """Writes token ids and sampling settings into config and generation config, where `generate` reads them.

    Rows without a token, and tokens that no text holds, are suppressed: whoever loads the saved model, with
    this project or without it, never samples them.
    """
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model.config.update(ids)
    unused = {tokenizer.bos_token_id, tokenizer.pad_token_id} - {tokenizer.eos_token_id}
    unused |= set(range(len(tokenizer), model.get_input_embeddings().num_embeddings))
    model.generation_config = GenerationConfig(**ids, do_sample=True, suppress_tokens=sorted(unused), **sampling)


def get_window(model: PreTrainedModel) -> int:
    """Most tokens a text can have: 2,048 for GPT-Neo, and where a model names no limit.

    A sliding window is not a limit: it is what one layer sees at once, and part of the model.
    """
    config = model.config.get_text_config()
    return next((limit for name in WINDOW_NAMES if (limit := getattr(config, name, None) or 0) > 0), 2048)


def keeps_texts_apart(model: PreTrainedModel) -> bool:
    """True where texts may be laid end to end in one row: for GPT-Neo, whose attention is ours."""
    return model.config._attn_implementation == ATTENTION_NAME
