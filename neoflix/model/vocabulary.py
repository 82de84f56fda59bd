"""A model's vocabulary: embeddings of new tokens, token ids, the window."""

from contextlib import nullcontext

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled

from neoflix.data.tokenizer import find_added_ids
from neoflix.model.attention import ATTENTION_NAME
from neoflix.model.packaged import find_packaged
from neoflix.model.shape import pad_vocab_size

# Names of the longest text in configs. Configs with n_positions have max_position_embeddings as well.
WINDOW_NAMES = ("max_position_embeddings", "max_seq_len", "seq_length", "context_length")


def resize_embeddings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, base: str, fills_spare_rows: bool = True
) -> None:
    """Grows the embeddings to the tokenizer's size, rounded up to a multiple of 64, and initializes new tokens.

    Many models have spare rows, which their tokenizer does not use and which were never trained. New tokens may get
    these rows. A new beginning token starts as a copy of the end token: GPT-Neo was trained on documents separated by
    `<|endoftext|>`, so it knows what follows one. Every other new row starts as the mean of the model's rows, so that
    its token is never likely. (Random rows could be likely, and could overflow fp16.)

    Args:
        base: hub name or folder of the model. Tokens that its tokenizer lacks are new.
        fills_spare_rows: False keeps the model's own rows and the head's bias unchanged.
    """
    old_size = model.get_input_embeddings().num_embeddings
    new_size = pad_vocab_size(max(len(tokenizer), old_size))
    if new_size != old_size:
        model.resize_token_embeddings(new_size, mean_resizing=False)
    new = set(range(old_size, new_size))
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    weights = [layer.weight for layer in layers]
    if fills_spare_rows:
        new |= find_added_ids(tokenizer, find_packaged(base))
        model.filled_spare_rows = min(new, default=old_size) < old_size
        weights += [layer.bias for layer in layers if getattr(layer, "bias", None) is not None]
    if not new:
        return
    for weight in {id(weight): weight for weight in weights}.values():
        with _gathered(weight), torch.no_grad():
            if weight.numel() == 0:  # ZeRO-3: only rank 0 holds the rows
                continue
            weight[sorted(new)] = weight[:old_size].float().mean(0).to(weight.dtype)
            if tokenizer.bos_token_id in new:
                weight[tokenizer.bos_token_id] = weight[tokenizer.eos_token_id]


def _gathered(weight: torch.Tensor):
    """A context in which rank 0 holds the whole weight under ZeRO-3, and may change it."""
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed  # takes seconds; sampling never needs it

    return deepspeed.zero.GatheredParameters(weight, modifier_rank=0)


def set_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: dict) -> None:
    """Writes token ids and sampling settings into the model's config and generation config.

    Rows without a token, and the beginning and padding tokens, are suppressed: `generate` never samples them, in this
    project or any other.
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
    """The most tokens a text can have: 2,048 for GPT-Neo, and for a model without a limit.

    A sliding window of attention is not a limit.
    """
    config = model.config.get_text_config()
    return next((limit for name in WINDOW_NAMES if (limit := getattr(config, name, None) or 0) > 0), 2048)


def keeps_texts_apart(model: PreTrainedModel) -> bool:
    """Whether texts can be packed into one row: our attention keeps them apart."""
    return model.config._attn_implementation == ATTENTION_NAME
