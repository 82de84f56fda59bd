"""A tokenizer as llama.cpp reads it from a GGUF file: a byte-level BPE with its merges and special tokens."""

import json

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

from neoflix.runtime.errors import UserError

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
# How a text is cut into words before the merges, by llama.cpp's names (src/llama-vocab.cpp).
PRE_TOKENIZERS = {"gpt-2": [BYTE_LEVEL], "smollm": [DIGITS, BYTE_LEVEL]}
# Settings of a BPE that llama.cpp does not have.
PLAIN = {"byte_fallback": False, "ignore_merges": False, "continuing_subword_prefix": "", "end_of_word_suffix": ""}


def add_vocabulary(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, named: str) -> None:
    """Adds the tokenizer to a GGUF file. llama.cpp puts the beginning token in front of each prompt.

    Args:
        named: how the user named the folder, which the error begins with.

    Raises:
        UserError: if llama.cpp would tokenize otherwise.
    """
    saved = json.loads(tokenizer.backend_tokenizer.to_str())
    writer.add_tokenizer_model("gpt2")  # llama.cpp's name for byte-level BPE
    writer.add_tokenizer_pre(find_pre_tokenizer(saved, named))
    writer.add_token_list(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))))
    writer.add_token_types([find_type(tokenizer, token) for token in range(len(tokenizer))])
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in saved["model"]["merges"]]
    writer.add_token_merges(merges)
    ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    ids |= {"padding": tokenizer.pad_token_id, "unknown": tokenizer.unk_token_id}
    for name, token in ids.items():
        if token is not None:
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)
    writer.add_add_bos_token(tokenizer.bos_token_id is not None)
    writer.add_add_space_prefix(False)
    writer.add_array("tokenizer.ggml.suppress_tokens", list_never_sampled(tokenizer))


def find_pre_tokenizer(saved: dict, named: str) -> str:
    """llama.cpp's name for how a tokenizer.json cuts texts into words.

    Raises:
        UserError: if llama.cpp has none, or the tokenizer is not a plain byte-level BPE.
    """
    before = saved["pre_tokenizer"] or {}
    steps = before.get("pretokenizers", [before])
    steps = [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]
    name = next((name for name, known in PRE_TOKENIZERS.items() if steps == known), None)
    is_plain = saved["model"]["type"] == "BPE" and saved["normalizer"] is None
    is_plain = is_plain and all((saved["model"].get(key) or plain) == plain for key, plain in PLAIN.items())
    if name is None or not is_plain:
        raise UserError(
            f"{named}: its tokenizer is not a byte-level BPE as GPT-2's or SmolLM's; only those can be written as GGUF"
        )
    return name


def find_type(tokenizer: PreTrainedTokenizerBase, token: int) -> TokenType:
    """What a token is. Text never becomes a control token; the names of other added tokens are found in texts."""
    added = tokenizer.added_tokens_decoder.get(token)
    if added is None:
        return TokenType.NORMAL
    return TokenType.CONTROL if added.special else TokenType.USER_DEFINED


def list_never_sampled(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that no text contains: beginning and padding."""
    return sorted({tokenizer.bos_token_id, tokenizer.pad_token_id} - {tokenizer.eos_token_id, None})
