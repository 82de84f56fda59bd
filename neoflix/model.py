"""Load or build the model, with room for its special tokens and with our attention."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import is_deepspeed_zero3_enabled

from neoflix.attention import ATTENTION_NAME, register_attention
from neoflix.loss import causal_lm_loss

DEMO = "demo"  # --model_name_or_path demo: a small GPT-Neo from scratch
DEMO_VOCAB_SIZE = 4096
VOCAB_MULTIPLE = 64  # matrix sizes that tensor cores take without a remainder


def build_demo_model(vocab_size: int) -> PreTrainedModel:
    """A GPT-Neo of 4 layers and width 256 with fresh weights: seconds to build, minutes to train on a CPU."""
    config = GPTNeoConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        num_layers=4,
        num_heads=4,
        attention_types=[[["global", "local"], 2]],
        max_position_embeddings=512,
        embed_dropout=0.1,
        resid_dropout=0.1,
        attention_dropout=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return build_model(config, torch.float32)


def build_model(config: GPTNeoConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A GPT-Neo with fresh weights, our attention and our loss."""
    register_attention()
    model = GPTNeoForCausalLM._from_config(config, attn_implementation=ATTENTION_NAME, dtype=dtype)
    model.loss_function = causal_lm_loss
    return model


def load_pretrained(model_name_or_path: str, dtype: torch.dtype) -> PreTrainedModel:
    """Loads a causal language model from a folder or the hub; GPT-Neo comes with our attention and loss.

    ValueError, in one sentence, where there is no such model or no weights.
    """
    register_attention()
    if is_deepspeed_zero3_enabled():  # weights are sharded as they load: DeepSpeed must know the other processes
        import deepspeed

        deepspeed.init_distributed()
    try:
        config = AutoConfig.from_pretrained(model_name_or_path)
        options = {"attn_implementation": ATTENTION_NAME} if config.model_type == "gpt_neo" else {}
        model, loading = AutoModelForCausalLM.from_pretrained(
            model_name_or_path, dtype=dtype, output_loading_info=True, **options
        )
    except (OSError, ValueError, SafetensorError) as error:
        if Path(model_name_or_path).is_dir():
            found = ", ".join(sorted(path.name for path in Path(model_name_or_path).iterdir())) or "nothing"
            cure = f"a model's folder needs config.json and weights (model.safetensors); this one has {found}"
        else:
            cure = "no such folder here, and the hub could not be reached or has no such model"
        raise ValueError(f"--model_name_or_path {model_name_or_path}: {cure}") from error
    if missing := sorted(loading["missing_keys"]):  # transformers fills them with random numbers
        raise ValueError(
            f"--model_name_or_path {model_name_or_path}: its weights lack {len(missing)} that config.json asks for, "
            f"{missing[0]} among them; weights and config.json are not of one model"
        )
    if config.model_type == "gpt_neo":
        model.loss_function = causal_lm_loss
    return model


def load_model(
    model_name_or_path: str, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, sampling: dict
) -> PreTrainedModel:
    """The model to train: loaded or built, fitted to the tokenizer, with generation settings to be saved.

    Args:
        dtype: of the weights in memory. DeepSpeed keeps its own fp32 copy for the optimizer.
        sampling: temperature, top_k, top_p, repetition_penalty, max_new_tokens.
    """
    if model_name_or_path == DEMO:
        model = build_demo_model(_padded(len(tokenizer)))
    else:
        model = load_pretrained(model_name_or_path, dtype)
        make_room_for_tokens(model, tokenizer)
    set_token_ids(model, tokenizer, sampling)
    return model


def _padded(vocab_size: int) -> int:
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def make_room_for_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Grows the vocabulary to the tokenizer's, rounded up to a multiple of 64, and fills the new rows.

    A new beginning token starts as a copy of the end token: GPT-Neo was trained on documents set apart by
    `<|endoftext|>`, so it already knows what comes after one. Every other new row starts as the mean row: a
    logit in the middle of all others, never a likely word. (An untouched random row would do neither, and in
    fp16 could overflow.)
    """
    import deepspeed  # seconds to import, and sampling never comes here

    old_size = model.get_input_embeddings().num_embeddings
    if len(tokenizer) <= old_size and old_size % VOCAB_MULTIPLE == 0:
        return
    model.resize_token_embeddings(_padded(max(len(tokenizer), old_size)), mean_resizing=False)
    weights = {
        id(layer.weight): layer.weight for layer in (model.get_input_embeddings(), model.get_output_embeddings())
    }
    for weight in weights.values():
        with deepspeed.zero.GatheredParameters(weight, modifier_rank=0), torch.no_grad():
            if weight.numel() == 0:  # ZeRO-3: only the modifying rank holds the rows
                continue
            weight[old_size:] = weight[:old_size].float().mean(0).to(weight.dtype)
            if tokenizer.bos_token_id >= old_size:
                weight[tokenizer.bos_token_id] = weight[tokenizer.eos_token_id]


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
    """Most tokens a text can have: 2,048 for GPT-Neo."""
    return getattr(model.config, "max_position_embeddings", None) or 2048


def keeps_texts_apart(model: PreTrainedModel) -> bool:
    """True where texts may be laid end to end in one row: for GPT-Neo, whose attention is ours."""
    return model.config._attn_implementation == ATTENTION_NAME
