"""Tokenizers and their special tokens. A leaf: imports nothing of ours."""

import hashlib
import tempfile
from pathlib import Path

from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer, GPT2TokenizerFast, PreTrainedTokenizerBase

from neoflix.runtime.cache import in_cache, new_path
from neoflix.runtime.errors import UserError

BOS, EOS, PAD = "<|startoftext|>", "<|endoftext|>", "<|pad|>"


def load_tokenizer(model_name_or_path: str) -> PreTrainedTokenizerBase:
    """Loads a model's tokenizer and gives it a beginning, an end and a padding token that differ.

    GPT-Neo's own has one token, `<|endoftext|>`, for all three: it stays the end; `<|startoftext|>` and
    `<|pad|>` are added. UserError where the folder or hub name holds no tokenizer.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"--model_name_or_path {model_name_or_path}: no tokenizer found there; a folder needs tokenizer.json "
            "(or vocab.json and merges.txt), a hub name needs a network connection or an earlier download"
        ) from error
    if not tokenizer.is_fast:  # training needs each token's place in the text, which only those of `tokenizers` tell
        raise UserError(
            f"--model_name_or_path {model_name_or_path}: its tokenizer, {type(tokenizer).__name__}, has no fast form "
            "(tokenizer.json); use a model that has one"
        )
    if len(tokenizer) < 2:
        raise UserError(f"--model_name_or_path {model_name_or_path}: its tokenizer has no vocabulary")
    set_special_tokens(tokenizer)
    return tokenizer


def read_tokenizer(folder: str | Path, named: str) -> PreTrainedTokenizerBase:
    """The tokenizer that lies with a model, as it is.

    UserError, which begins with how the user `named` it, where none does: of no files at all transformers makes an
    empty one.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{named}: holds a model but no tokenizer") from error
    if len(tokenizer) < 2:
        raise UserError(f"{named}: holds a model but no tokenizer")
    return tokenizer


def set_special_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """Adds what is missing of bos, eos and pad, in place; what a tokenizer already tells apart stays."""
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
    """Ids of the tokens that a tokenizer has and that of its base model, a hub name or folder, does not."""
    known = read_tokenizer(base, base).get_vocab()
    return {number for token, number in tokenizer.get_vocab().items() if token not in known}


def train_tokenizer(texts: list[str], vocab_size: int, cache_dir: Path) -> PreTrainedTokenizerBase:
    """Trains a byte-level BPE on `texts`; the same texts give the same tokenizer.

    It is kept in `cache_dir` under a hash of the texts, so that every process of a run reads one and the
    same file: the main process must come first.
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
