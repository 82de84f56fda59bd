"""Loads or builds the model, with embeddings for its special tokens and our attention."""

import os
from pathlib import Path

import torch
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
from transformers.utils import GENERATION_CONFIG_NAME, logging

import neoflix.model.register  # noqa: F401  transformers then knows ATTENTION_NAME
from neoflix.data.template import Example, Template, attach_template
from neoflix.data.tokenizer import load_tokenizer, read_tokenizer, train_tokenizer
from neoflix.model.attention import ATTENTION_NAME
from neoflix.model.folder import holds_adapters
from neoflix.model.lora import add_adapters, merge_adapters, read_adapters
from neoflix.model.loss import causal_lm_loss
from neoflix.model.packaged import find_packaged
from neoflix.model.shape import PACKED, pad_vocab_size
from neoflix.model.source import check_architecture, check_reachable, explain_loading_errors, find_pickle
from neoflix.model.vocabulary import resize_embeddings, set_token_ids
from neoflix.runtime.errors import UserError
from neoflix.runtime.hardware import has_gpu

DEMO = "demo"  # --model_name_or_path demo: a small GPT-Neo from scratch
DEMO_VOCAB_SIZE = 4096


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
    _connect_for_sharding()
    model = GPTNeoForCausalLM._from_config(config, attn_implementation=ATTENTION_NAME, dtype=dtype)
    model.loss_function = causal_lm_loss
    return model


def _connect_for_sharding() -> None:
    """Connects the processes under ZeRO-3, which shards each weight when it is created."""
    if is_deepspeed_zero3_enabled():
        import deepspeed  # takes seconds; sampling never needs it

        deepspeed.init_distributed()


def load_pretrained(model_name_or_path: str, dtype: torch.dtype | str, allow_pickle: bool = False) -> PreTrainedModel:
    """Loads a causal language model from a folder or the hub, with our loss; those in PACKED with our attention.

    Weights are read from safetensors, and a model's own code never runs (docs/loading.md). For a folder with LoRA
    adapters, this loads the base model, resizes its embeddings to the folder's tokenizer and merges the adapters.

    Args:
        dtype: of the weights in memory; "auto" keeps the saved one.
        allow_pickle: read pytorch_model.bin, with `weights_only=True`, if there is no safetensors file.

    Raises:
        UserError: if the model or its weights are not found, or the weights are only in a pickle.
    """
    model_name_or_path = find_packaged(model_name_or_path)
    if holds_adapters(model_name_or_path):
        return _load_adapted(Path(model_name_or_path), dtype, allow_pickle)
    check_reachable(model_name_or_path)
    logging.disable_progress_bar()  # of every process; a download has its own
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")  # else a bot of the hub's converts, and we load that
    _connect_for_sharding()
    with explain_loading_errors(model_name_or_path):
        config = AutoConfig.from_pretrained(model_name_or_path, trust_remote_code=False)
    check_architecture(config, f"--model_name_or_path {model_name_or_path}")
    with explain_loading_errors(model_name_or_path):
        pickled = find_pickle(model_name_or_path, config)
    if pickled and not allow_pickle:
        raise UserError(
            f"--model_name_or_path {model_name_or_path}: its weights are in {pickled}, a pickle, which can run code "
            "when it is read; use a model with safetensors or, if you trust its authors, set --allow_pickle true"
        )
    options = {"attn_implementation": ATTENTION_NAME} if config.model_type in PACKED else {}
    with explain_loading_errors(model_name_or_path):
        model, loading = AutoModelForCausalLM.from_pretrained(
            model_name_or_path,
            dtype=dtype,
            use_safetensors=None if pickled else True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    if missing := sorted(loading["missing_keys"]):  # transformers fills them with random numbers
        raise UserError(
            f"--model_name_or_path {model_name_or_path}: {len(missing)} weights of config.json are missing, such as "
            f"{missing[0]}; the weights and config.json must belong to the same model"
        )
    model.loss_function = causal_lm_loss
    return model


def _load_adapted(folder: Path, dtype: torch.dtype | str, allow_pickle: bool) -> PreTrainedModel:
    """The base model in the dtype in which the adapters were trained, then in `dtype` with the adapters merged."""
    if is_deepspeed_zero3_enabled():  # this process holds only a shard of each weight
        raise UserError(
            f"--model_name_or_path {folder}: holds LoRA adapters, which ZeRO-3 cannot merge; merge them first "
            f"(python -m neoflix.export --to merged {folder} OUT), or use a --deepspeed file of another stage"
        )
    base, trained_dtype, fills_spare_rows = read_adapters(folder)
    tokenizer = read_tokenizer(folder, f"--model_name_or_path {folder}")
    try:
        model = load_pretrained(base, trained_dtype, allow_pickle)
    except ValueError as error:
        raise UserError(f"{folder}: holds LoRA adapters, and their base model cannot be loaded: {error}") from error
    resize_embeddings(model, tokenizer, base, fills_spare_rows)
    set_token_ids(model, tokenizer, {})
    if (folder / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return merge_adapters(model if dtype == "auto" else model.to(dtype), folder)


def load_for_reading(model_name_or_path: str, device: str | None = None, allow_pickle: bool = False) -> PreTrainedModel:
    """Loads a model for inference: on CUDA in bf16 (fp16 before Ampere), otherwise on the CPU in fp32.

    Raises:
        UserError: as `load_pretrained`, and if the weights do not fit on the GPU.
    """
    device = device or ("cuda" if has_gpu() else "cpu")
    dtype = torch.float32
    if device.startswith("cuda"):
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    model = load_pretrained(model_name_or_path, dtype, allow_pickle)
    try:
        return model.eval().to(device)
    except torch.OutOfMemoryError as error:
        need, free = model.get_memory_footprint() / 2**30, torch.cuda.mem_get_info()[0] / 2**30
        raise UserError(
            f"{model_name_or_path}: its weights need {need:.1f} GiB, and the GPU has {free:.1f} GiB free; end other "
            "programs on it, or set CUDA_VISIBLE_DEVICES= to sample on the CPU"
        ) from error


def load_model(
    model_name_or_path: str,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    sampling: dict,
    allow_pickle: bool = False,
    lora: dict | None = None,
) -> PreTrainedModel:
    """Loads or builds the model to train, with embeddings for the tokenizer and the generation settings to save.

    Args:
        dtype: of the weights in memory. DeepSpeed keeps an fp32 copy for the optimizer.
        sampling: temperature, top_k, top_p, repetition_penalty, max_new_tokens.
        allow_pickle: see `load_pretrained`.
        lora: rank and alpha of LoRA adapters, to train these instead of the model's weights.

    Raises:
        UserError: as `load_pretrained`.
    """
    if model_name_or_path == DEMO:
        model = build_demo_model(pad_vocab_size(len(tokenizer))).to(dtype)
    else:
        model = load_pretrained(model_name_or_path, dtype, allow_pickle)
        resize_embeddings(model, tokenizer, model_name_or_path)
    set_token_ids(model, tokenizer, sampling)
    return add_adapters(model, base=model_name_or_path, **lora) if lora else model


def find_tokenizer(
    model_name_or_path: str, examples: list[Example], cache_dir: Path, template: Template | None = None
) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with the template attached if there is one.

    The demo's tokenizer is trained on these texts and kept in `cache_dir`.
    """
    if model_name_or_path == DEMO:
        tokenizer = train_tokenizer([example.whole for example in examples], DEMO_VOCAB_SIZE, cache_dir)
    else:
        model_name_or_path = find_packaged(model_name_or_path)
        check_reachable(model_name_or_path)
        tokenizer = load_tokenizer(model_name_or_path)
    attach_template(tokenizer, template)
    return tokenizer
