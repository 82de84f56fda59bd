"""Load or build the model, with room for its special tokens and with our attention."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from pickle import UnpicklingError
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch
import transformers
from huggingface_hub import is_offline_mode, try_to_load_from_cache
from huggingface_hub.constants import ENDPOINT
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import (
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
    has_file,
    logging,
)

from neoflix.architectures import find_decoder
from neoflix.attention import ATTENTION_NAME, register_attention
from neoflix.checkpoint import has_shards_alone, holds_adapters
from neoflix.errors import UserError
from neoflix.lora import add_adapters, merge_adapters, read_adapters
from neoflix.loss import causal_lm_loss
from neoflix.machine import has_gpu
from neoflix.template import Template, attach_template
from neoflix.tokenizer import load_tokenizer, read_tokenizer, train_tokenizer

DEMO = "demo"  # --model_name_or_path demo: a small GPT-Neo from scratch
DEMO_VOCAB_SIZE = 4096
HUB_TIMEOUT = 10  # seconds
# What configs call the longest text; those that map n_positions to max_position_embeddings have it under that name too.
WINDOW_NAMES = ("max_position_embeddings", "max_seq_len", "seq_length", "context_length")
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


def load_pretrained(model_name_or_path: str, dtype: torch.dtype | str, allow_pickle: bool = False) -> PreTrainedModel:
    """Loads a causal language model from a folder or the hub; GPT-Neo comes with our attention and loss.

    Weights come from safetensors, and no code of the model's own is run (docs/loading.md). Of a folder with LoRA
    adapters: their base model, with room for the folder's tokens and the adapters merged into it.

    Args:
        dtype: of the weights in memory; "auto": as they were saved.
        allow_pickle: where there is no safetensors file, take weights from pytorch_model.bin. torch then reads it
            with `weights_only=True`.

    UserError, in one sentence, where there is no such model, or no weights, or only pickled ones.
    """
    if holds_adapters(model_name_or_path):
        return _load_adapted(Path(model_name_or_path), dtype, allow_pickle)
    check_reachable(model_name_or_path)
    register_attention()
    logging.disable_progress_bar()  # of every process; a download has its own
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")  # else a bot of the hub's converts, and we load that
    if is_deepspeed_zero3_enabled():  # weights are sharded as they load: DeepSpeed must know the other processes
        import deepspeed

        deepspeed.init_distributed()
    with _in_one_sentence(model_name_or_path):
        config = AutoConfig.from_pretrained(model_name_or_path, trust_remote_code=False)
    check_architecture(config, f"--model_name_or_path {model_name_or_path}")
    with _in_one_sentence(model_name_or_path):
        pickled = find_pickle(model_name_or_path, config)
    if pickled and not allow_pickle:
        raise UserError(
            f"--model_name_or_path {model_name_or_path}: its weights are in {pickled}, a pickle, which can run code as "
            "it is read; take a model with safetensors or, if you trust who made this one, say --allow_pickle true"
        )
    options = {"attn_implementation": ATTENTION_NAME} if config.model_type == "gpt_neo" else {}
    with _in_one_sentence(model_name_or_path):
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
            f"--model_name_or_path {model_name_or_path}: its weights lack {len(missing)} that config.json asks for, "
            f"{missing[0]} among them; weights and config.json are not of one model"
        )
    if config.model_type == "gpt_neo":
        model.loss_function = causal_lm_loss
    return model


def _load_adapted(folder: Path, dtype: torch.dtype | str, allow_pickle: bool) -> PreTrainedModel:
    """A base model as its adapters saw it, rounded as it was then, with the adapters merged into it in `dtype`."""
    if is_deepspeed_zero3_enabled():  # a share of each weight is here: nothing to merge adapters into
        raise UserError(
            f"--model_name_or_path {folder}: holds LoRA adapters, which ZeRO-3 cannot merge; write the whole model "
            f"first (python -m neoflix.export --to merged {folder} OUT), or take a --deepspeed file of another stage"
        )
    base, trained_dtype = read_adapters(folder)
    tokenizer = read_tokenizer(folder, f"--model_name_or_path {folder}")
    try:
        model = load_pretrained(base, trained_dtype, allow_pickle)
    except ValueError as error:
        raise UserError(f"{folder} holds LoRA adapters, and the model they belong to did not load: {error}") from error
    make_room_for_tokens(model, tokenizer)
    set_token_ids(model, tokenizer, {})
    if (folder / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return merge_adapters(model if dtype == "auto" else model.to(dtype), folder)


def load_for_reading(model_name_or_path: str, device: str | None = None, allow_pickle: bool = False) -> PreTrainedModel:
    """Loads a model that is not to be trained: on CUDA in bf16 (fp16 before Ampere), else on the CPU in fp32.

    UserError as `load_pretrained`, and where the GPU has no room for the weights.
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
            f"{model_name_or_path}: its weights take {need:.1f} GiB, and {free:.1f} of the GPU are free; end what else "
            "runs there, or set CUDA_VISIBLE_DEVICES= to sample on the CPU"
        ) from error


def check_reachable(model_name_or_path: str) -> None:
    """UserError, within seconds, for a model that is not here while the hub cannot be reached (the hub's own library
    tries for most of a minute before it says so). Whether the hub has such a model is not asked."""
    name = model_name_or_path
    if is_offline_mode() or Path(name).exists() or name.count("/") > 1:
        return
    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        urlopen(Request(ENDPOINT, method="HEAD"), timeout=HUB_TIMEOUT).close()
    except HTTPError:
        return  # it answers
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise UserError(
            f"--model_name_or_path {name}: no such folder here, and {ENDPOINT} cannot be reached ({reason}); connect "
            "to a network, or name a folder that holds the model"
        ) from error


def check_architecture(config: PreTrainedConfig, named: str) -> None:
    """UserError for a model that does not continue text, or not only; it begins with how the user `named` the model."""
    kind, cure = f"{named}: a {config.model_type} model", "use a causal language model (docs/loading.md has a list)"
    if config.is_encoder_decoder:
        raise UserError(f"{kind} has an encoder and a decoder; {cure}")
    if config.get_text_config() is not config or hasattr(config, "vision_config"):
        raise UserError(f"{kind} reads images or sound as well as text; {cure}")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{kind} has no head for causal language modeling in transformers; {cure}")


def find_pickle(model_name_or_path: str, config: PreTrainedConfig) -> str | None:
    """The pickled file that transformers would read weights from; None where it finds safetensors, or nothing.

    `use_safetensors=True` alone would not do: config.json may name a file, and so may an index of safetensors.
    """
    named = getattr(config, "transformers_weights", None)
    known = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)  # in transformers' order
    file = named or next((file for file in known if has_file(model_name_or_path, file)), None)
    files = [file] if file else []
    if file and file.endswith(".safetensors.index.json"):
        index = json.loads(Path(cached_file(model_name_or_path, file)).read_text(encoding="utf-8"))
        files = sorted(set(index.get("weight_map", {}).values()))
    return next((file for file in files if not file.endswith(".safetensors")), None)


@contextmanager
def _in_one_sentence(model_name_or_path: str) -> Iterator[None]:
    """Turns what transformers raises where there is no model into a UserError that says what is missing."""
    try:
        yield
    except (OSError, ValueError, SafetensorError, UnpicklingError) as error:
        folder = Path(model_name_or_path)
        if isinstance(error, UnpicklingError):
            cure = "its pickled weights hold more than tensors, or are broken; they are not read"
        elif "trust_remote_code" in str(error):
            cure = "it comes with code of its own, which is not run; take a model that transformers knows"
        elif "does not recognize this architecture" in str(error):
            cure = f"transformers {transformers.__version__} does not know its architecture; use a model that it knows"
        elif folder.is_dir() and has_shards_alone(folder):
            cure = f"its weights lie in shards; `python generate.py --model_dir {folder}` gathers them there"
        elif folder.is_dir():
            found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
            cure = f"a model's folder needs config.json and weights (model.safetensors); this one has {found}"
        else:
            cure = "no such folder here, and the hub could not be reached or has no such model"
        raise UserError(f"--model_name_or_path {model_name_or_path}: {cure}") from error


def load_model(
    model_name_or_path: str,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    sampling: dict,
    allow_pickle: bool = False,
    lora: dict | None = None,
) -> PreTrainedModel:
    """The model to train: loaded or built, fitted to the tokenizer, with generation settings to be saved.

    Args:
        dtype: of the weights in memory. DeepSpeed keeps its own fp32 copy for the optimizer.
        sampling: temperature, top_k, top_p, repetition_penalty, max_new_tokens.
        allow_pickle: see `load_pretrained`.
        lora: rank and alpha of adapters to be trained in the model's stead, which it is then wrapped in.

    UserError as `load_pretrained`, and for a model that could not be sampled once it is trained.
    """
    if model_name_or_path == DEMO:
        model = build_demo_model(_padded(len(tokenizer)))
    else:
        model = load_pretrained(model_name_or_path, dtype, allow_pickle)
        if not is_deepspeed_zero3_enabled():  # no process has whole weights there: found at the first evaluation
            find_decoder(model)
        make_room_for_tokens(model, tokenizer)
    set_token_ids(model, tokenizer, sampling)
    return add_adapters(model, base=model_name_or_path, **lora) if lora else model


def find_tokenizer(
    model_name_or_path: str, texts: list[str], cache_dir: Path, template: Template | None = None
) -> PreTrainedTokenizerBase:
    """The model's tokenizer, which carries the template, if there is one; the demo's is trained on `texts`, and kept in
    `cache_dir`."""
    if model_name_or_path == DEMO:
        tokenizer = train_tokenizer(texts, DEMO_VOCAB_SIZE, cache_dir)
    else:
        check_reachable(model_name_or_path)
        tokenizer = load_tokenizer(model_name_or_path)
    attach_template(tokenizer, template and template.with_rows(texts))
    return tokenizer


def _padded(vocab_size: int) -> int:
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def make_room_for_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Grows the vocabulary to the tokenizer's, rounded up to a multiple of 64, and fills the new rows.

    A new beginning token starts as a copy of the end token: GPT-Neo was trained on documents set apart by
    `<|endoftext|>`, so it already knows what comes after one. Every other new row starts as the mean row: a
    logit in the middle of all others, never a likely word. (An untouched random row would do neither, and in
    fp16 could overflow.)
    """
    old_size = model.get_input_embeddings().num_embeddings
    if len(tokenizer) <= old_size and old_size % VOCAB_MULTIPLE == 0:
        return
    model.resize_token_embeddings(_padded(max(len(tokenizer), old_size)), mean_resizing=False)
    weights = {
        id(layer.weight): layer.weight for layer in (model.get_input_embeddings(), model.get_output_embeddings())
    }
    for weight in weights.values():
        with _gathered(weight), torch.no_grad():
            if weight.numel() == 0:  # ZeRO-3: only the modifying rank holds the rows
                continue
            weight[old_size:] = weight[:old_size].float().mean(0).to(weight.dtype)
            if tokenizer.bos_token_id >= old_size:
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
