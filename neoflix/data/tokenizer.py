"""Tokenizers and their special tokens."""

import hashlib
import tempfile
from pathlib import Path

from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer, GPT2TokenizerFast, PreTrainedTokenizerBase

from neoflix.runtime.cache import in_cache, new_path
from neoflix.runtime.errors import UserError

BOS, EOS, PAD = "<|startoftext|>", "<|endoftext|>", "<|pad|>"


def load_tokenizer(model_name_or_path: str) -> PreTrainedTokenizerBase:
    """Loads a model's tokenizer, with different tokens for beginning, end and padding.

    GPT-Neo's tokenizer uses `<|endoftext|>` for all three. It stays the end token; `<|startoftext|>` and `<|pad|>` are
    added.

    Raises:
        UserError: if the folder or hub name has no tokenizer, or a slow one.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"--model_name_or_path {model_name_or_path}: no tokenizer found; a folder needs tokenizer.json "
            "(or vocab.json and merges.txt), a hub name needs a network connection or an earlier download"
        ) from error
    if not tokenizer.is_fast:  # training needs the offset of each token in the text
        raise UserError(
            f"--model_name_or_path {model_name_or_path}: its tokenizer, {type(tokenizer).__name__}, has no fast form "
            "(tokenizer.json); use a model that has one"
        )
    if len(tokenizer) < 2:
        raise UserError(f"--model_name_or_path {model_name_or_path}: its tokenizer has no vocabulary")
    set_special_tokens(tokenizer)
    return tokenizer


def read_tokenizer(folder: str | Path, named: str) -> PreTrainedTokenizerBase:
    """A model's tokenizer, unchanged.

    Args:
        named: how the user named the folder, which the error begins with.

    Raises:
        UserError: if there is none. (transformers makes an empty tokenizer if it finds no files.)
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{named}: has no tokenizer") from error
    if len(tokenizer) < 2:
        raise UserError(f"{named}: has no tokenizer")
    return tokenizer


def set_special_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """Adds the bos, eos and pad tokens that a tokenizer lacks or uses for another purpose too, in place."""
    missing = {}
    if tokenizer.eos_token is None:
        missing["eos_token"] = EOS
    eos = missing.get("eos_token", tokenizer.eos_token)
    if tokenizer.bos_token in (None, eos):
        missing["bos_token"] = BOS
    bos = missing.get("bos_token", tokenizer.bos_token)
    if tokenizer.pad_token in (None, eos, bos):
        missing["pad_token"] = PAD
    tokenizer.add_special_tokens(missing)


def find_added_ids(tokenizer: PreTrainedTokenizerBase, base: str) -> set[int]:
    """Ids of the tokens that the tokenizer of `base`, a hub name or folder, lacks."""
    known = read_tokenizer(base, base).get_vocab()
    return {number for token, number in tokenizer.get_vocab().items() if token not in known}


def train_tokenizer(texts: list[str], vocab_size: int, cache_dir: Path) -> PreTrainedTokenizerBase:
    """Trains a byte-level BPE on `texts`. The same texts give the same tokenizer.

    It is kept in `cache_dir` under a hash of the texts, where all processes of a run read it. The main process must be
    the first to call this.
    """
    digest = hashlib.sha256("\0".join([str(vocab_size), *texts]).encode()).hexdigest()[:16]
    folder = cache_dir / f"tokenizer-{digest}"
    with in_cache(cache_dir):
        if not folder.is_dir():
            bpe = ByteLevelBPETokenizer()
            special = [EOS, BOS, PAD]
            bpe.train_from_iterator(texts, vocab_size, min_frequency=2, show_progress=False, special_tokens=special)
            with new_path(folder, is_folder=True) as unfinished:
                with tempfile.TemporaryDirectory() as vocabulary:
                    bpe.save_model(vocabulary)
                    tokenizer = GPT2TokenizerFast.from_pretrained(vocabulary)
                set_special_tokens(tokenizer)
                tokenizer.save_pretrained(unfinished)
    return AutoTokenizer.from_pretrained(folder)
