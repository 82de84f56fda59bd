"""`python -m neoflix.export --to gguf`: a model, its tokenizer and its sampling settings in one file for llama.cpp.

A Modelfile for Ollama is written beside it.
"""

from pathlib import Path

import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from transformers import PreTrainedModel

from neoflix.arguments.sampling import SAMPLING_DEFAULTS
from neoflix.checkpoints.runs import find_run
from neoflix.exporting.gguf_vocabulary import add_vocabulary
from neoflix.exporting.gguf_weights import SUPPORTED, announce, check_supported, encode, list_tensors, stored_type
from neoflix.exporting.modelfile import write_modelfile
from neoflix.exporting.source import find_source, load_source
from neoflix.exporting.targets import check_room, files_appearing_whole
from neoflix.model.gpt2 import context_limit, limit_of, name_of, rounding_of
from neoflix.model.packaged import SMOLLM2
from neoflix.runtime.console import say
from neoflix.runtime.errors import UserError

SUFFIX = ".gguf"
Q8_0 = "q8_0"
FILE_TYPES = {  # --dtype: (data type of matrices, the file's)
    "float32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "float16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bfloat16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    Q8_0: (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
# Temperature before top_p, as in this project; llama.cpp's own order has it last.
SAMPLERS = "penalties;temperature;top_k;top_p"


def export_gguf(run: str, out: str, dtype: str | None = None, allow_pickle: bool = False) -> None:
    """Writes a GPT-Neo (as a GPT-2) or a Llama as a GGUF file, and a Modelfile for Ollama beside it.

    `out` appears complete or not at all. Needs memory for the weights as saved, and for the largest once more.

    Args:
        run: a run's folder (for its best model), or one of its checkpoints. LoRA adapters are merged.
        out: a new file whose name ends in .gguf.
        dtype: "float32", "float16", "bfloat16", or "q8_0": 8-bit integers with a scale for each 32 of a row; None: as
            saved.
        allow_pickle: see `load_pretrained`.

    Raises:
        UserError: if there is no model, or it or its tokenizer cannot be written as GGUF; if `out` exists or cannot be
            written; if a weight overflows float16.
    """
    target = Path(out)
    modelfile = target.with_suffix(".Modelfile")
    check_gguf_target(target, modelfile)
    folder = find_source(run, SUPPORTED)
    # Adapters are merged in the dtype that is loaded.
    model, tokenizer = load_source(folder, torch.float32 if dtype == "float32" else "auto", allow_pickle, SUPPORTED)
    check_supported(model.config, f"RUN {folder}")
    dtype = dtype or name_of(model.dtype)
    positions, settings = context_length_of(model), settings_of(model)

    with files_appearing_whole(modelfile, target) as unfinished:
        writer = GGUFWriter(unfinished / target.name, "llama" if model.config.model_type == "llama" else "gpt2")
        add_facts(writer, model, folder, FILE_TYPES[dtype][1])
        add_sampling(writer, settings)
        add_vocabulary(writer, tokenizer, f"RUN {folder}")
        num_fp16 = write_weights(writer, model, len(tokenizer), FILE_TYPES[dtype][0], unfinished)
        write_modelfile(unfinished / modelfile.name, target.name, tokenizer, settings, positions)
    say(f"{folder} -> {target}: {writer.arch} for llama.cpp, {dtype}, texts of up to {positions:,} tokens")
    say(f"{modelfile}: for Ollama (ollama create {target.stem} -f {modelfile})")
    for sentence in remarks_on(model, dtype, num_fp16):
        say(sentence)


def check_gguf_target(target: Path, modelfile: Path) -> None:
    """Raises UserError unless `target` is a new file with the right suffix, and the Modelfile is new too."""
    if target.suffix != SUFFIX:
        raise UserError(f"OUT {target}: must be a file whose name ends in {SUFFIX}")
    for path in (target, modelfile):
        if path.exists():
            raise UserError(f"OUT {target}: {path} exists already; choose another name or delete it")


def context_length_of(model: PreTrainedModel) -> int:
    """The most tokens of a text, prompt included."""
    config = model.config
    return config.max_position_embeddings if config.model_type == "llama" else context_limit(config)


def settings_of(model: PreTrainedModel) -> dict:
    """The sampling settings saved with the model, or the defaults; the text ends where the context does."""
    saved = {name: getattr(model.generation_config, name, None) for name in SAMPLING_DEFAULTS}
    settings = SAMPLING_DEFAULTS | {name: value for name, value in saved.items() if value is not None}
    return settings | {"max_new_tokens": min(settings["max_new_tokens"], context_length_of(model) - 1)}


def add_facts(writer: GGUFWriter, model: PreTrainedModel, folder: Path, file_type: LlamaFileType) -> None:
    """Adds what the model is: its name, licence and shape."""
    config = model.config
    writer.add_type("model")
    writer.add_name(folder.absolute().name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(2)
    writer.add_license(license_of((find_run(folder) or {}).get("model", "")))
    writer.add_context_length(context_length_of(model))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    if config.model_type == "llama":
        writer.add_description("A Llama, fine-tuned with neoflix.")
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        writer.add_description(f"A GPT-Neo in GPT-2's layout, fine-tuned with neoflix. {limit_of(config)}".strip())
        writer.add_feed_forward_length(config.intermediate_size or 4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)


def license_of(base: str) -> str:
    """The licence of a base model, by its hub name; empty for one that is not known here."""
    if base == SMOLLM2:
        return "apache-2.0"
    return "mit" if base.lower().startswith("eleutherai/gpt-neo-") else ""


def add_sampling(writer: GGUFWriter, settings: dict) -> None:
    """Adds the sampling settings, which llama.cpp takes where its user gives none."""
    writer.add_sampling_sequence(SAMPLERS)
    writer.add_sampling_temp(settings["temperature"])
    writer.add_sampling_top_k(settings["top_k"])
    writer.add_sampling_top_p(settings["top_p"])
    writer.add_sampling_min_p(0.0)
    writer.add_sampling_penalty_repeat(settings["repetition_penalty"])
    writer.add_sampling_penalty_last_n(-1)  # the whole text


def write_weights(
    writer: GGUFWriter, model: PreTrainedModel, num_tokens: int, asked: GGMLQuantizationType, folder: Path
) -> int:
    """Writes everything added so far and the weights, one at a time. Returns how many matrices are fp16 because Q8_0
    cannot hold them.

    Raises:
        UserError: if the disk is too small, or a weight overflows.
    """
    kinds, num_bytes = {}, 0
    for name, weight in list_tensors(model, num_tokens, on_meta=True):
        kinds[name] = stored_type(name, weight.shape, asked)
        num_bytes += announce(writer, name, tuple(weight.shape), kinds[name])
    check_room(num_bytes, folder)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, weight in list_tensors(model, num_tokens):
            writer.write_tensor_data(encode(name, weight, kinds[name]))
    finally:
        writer.close()
    return sum(kind == GGMLQuantizationType.F16 and asked != kind for kind in kinds.values())


def remarks_on(model: PreTrainedModel, dtype: str, num_fp16: int) -> list[str]:
    """Sentences on what the file does not keep."""
    remarks = []
    if model.config.model_type == "gpt_neo":
        remarks += [limit_of(model.config)]
        if dtype != Q8_0:
            remarks += [rounding_of(model.config, getattr(torch, dtype))]
    if num_fp16:
        remarks += [f"{num_fp16} matrices are float16: their rows do not divide into q8_0's blocks of 32"]
    return [remark for remark in remarks if remark]
