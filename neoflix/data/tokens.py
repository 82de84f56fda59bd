"""The way of the data, once it is read (reading.py): split -> tokenise -> batch -> collate.

Shapes: B = 1 row a batch where texts are packed, else texts; T tokens a row.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from neoflix.data.packing import (
    MOST_CROWDED,
)
from neoflix.data.split import TextSplit
from neoflix.data.template import parts
from neoflix.runtime.cache import in_cache, new_path
from neoflix.runtime.console import progress, say
from neoflix.runtime.errors import UserError

# `prompt_length`: tokens at a text's beginning that are not targets. `num_chars`: characters of the targets.
TOKENS = Features({"input_ids": List(Value("int32")), "prompt_length": Value("int32"), "num_chars": Value("int32")})

FILE_VERSION = 2  # of the columns above: files of version 1, `{name}.arrow`, call the second one `num_given`

FEWEST_TOKENS = 8  # of a text that must be kept behind its prompt


class Tokens(NamedTuple):
    """A side's tokens: `input_ids` (list of int32), `prompt_length` (tokens that are not targets) and `num_chars`
    (characters of the targets that were kept); and what was lost of its texts."""

    dataset: Dataset
    num_tokens: int
    num_cut: int  # texts that were cut
    num_crowded: int  # texts that were left out, since their prompts leave no room for them
    longest_prompt: int  # tokens


def tokenize_split(
    split: TextSplit, tokenizer: PreTrainedTokenizerBase, max_length: int, cache_dir: Path, learn_prompt: bool = False
) -> tuple[Dataset, Dataset]:
    """Tokens of both sides, (train, validation). Says how many, and how many texts were cut or left out."""
    sides = {
        name: tokenize_texts(texts, tokenizer, max_length, cache_dir, learn_prompt)
        for name, texts in split._asdict().items()
    }
    check_room(split, list(sides.values()), max_length)
    for name, tokens in sides.items():
        cut = f"; {tokens.num_cut:,} texts longer than {max_length} tokens were cut" if tokens.num_cut else ""
        crowded = f"; {tokens.num_crowded:,} were left out: their prompts fill {max_length} tokens"
        say(
            f"{name}: {len(tokens.dataset):,} texts, {tokens.num_tokens:,} tokens{cut}"
            f"{crowded if tokens.num_crowded else ''}"
        )
    warn_of_markers([*split.train, *split.validation], tokenizer)
    return tuple(tokens.dataset for tokens in sides.values())


def check_room(texts: Iterable[list[str]], sides: list[Tokens], max_length: int) -> None:
    """UserError where prompts leave no room for too many of the texts, or for all of one side."""
    num_crowded, num_texts = sum(tokens.num_crowded for tokens in sides), sum(map(len, texts))
    is_empty = any(side and not len(tokens.dataset) for side, tokens in zip(texts, sides, strict=True))
    if is_empty or num_crowded > MOST_CROWDED * num_texts:
        needed = max(tokens.longest_prompt for tokens in sides) + FEWEST_TOKENS + 2
        raise UserError(
            f"--max_length {max_length}: the prompts of {num_crowded:,} of {num_texts:,} texts leave room for fewer "
            f"than {FEWEST_TOKENS} tokens of the text; use {needed} or more, if the model's window allows it, or "
            "a shorter --template"
        )


def warn_of_markers(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> None:
    """Says where texts hold the names of control tokens: they are read as text."""
    for marker in dict.fromkeys([tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token]):
        if marker and (count := sum(marker in text for text in texts)):
            say(
                f"warning: {count:,} of {len(texts):,} texts hold {marker!r}, which is read as plain text, not as the "
                "control token, and the model will write it; remove it: each text gets control tokens of its own"
            )


def tokenize_texts(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, max_length: int, cache_dir: Path, learn_prompt: bool = False
) -> Tokens:
    """`<|startoftext|> prompt text <|endoftext|>` as ids, memory-mapped from a cache file.

    The file's name begins with `name_tokens`; whoever comes first writes it, under
    another name until it is whole: several may, at once, where nodes share the folder. Tokens are never all in
    memory. A control token's name inside a text is text. Prompt and text are made into tokens each by itself, as in
    sampling. A text of more than `max_length` tokens (prompt and both special ones counted) is cut before its end
    token; it is left out where its prompt leaves room for fewer than `FEWEST_TOKENS` of it.

    Args:
        learn_prompt: whether prompts are targets too; of texts without one everything but `<|startoftext|>` is.

    Raises:
        UserError: where the cache cannot be written.
    """
    name = name_tokens(texts, tokenizer, max_length, learn_prompt)
    path = cache_dir / f"{name}.{FILE_VERSION}.arrow"
    with in_cache(cache_dir):
        if not path.is_file():
            _write_tokens(texts, tokenizer, max_length, path, learn_prompt)
        counts = {"num_crowded": 0, "longest_prompt": 0} | json.loads(path.with_suffix(".json").read_text())
        return Tokens(Dataset.from_file(str(path), split=name), **counts)


def name_tokens(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, max_length: int, learn_prompt: bool = False
) -> str:
    """What these texts' tokens are called: a hash of all that they depend on. A run's record has it as "data"."""
    version = 3 if any(parts(text)[0] for text in texts) else 2  # before 3 no text was left out
    facts = f"{version} {max_length} {tokenizer.bos_token_id} {tokenizer.eos_token_id} {learn_prompt}"
    digest = hashlib.sha256(facts.encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    for text in texts:
        digest.update("\0".join(parts(text)).encode())
        digest.update(b"\0")
    return f"tokens-{digest.hexdigest()[:24]}"


def _write_tokens(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, max_length: int, path: Path, learn_prompt: bool = False
) -> None:
    counts = dict.fromkeys(Tokens._fields[1:], 0)
    with new_path(path) as unfinished:
        with pa.OSFile(str(unfinished), "wb") as file, pa.ipc.new_stream(file, TOKENS.arrow_schema) as stream:
            for start in progress(range(0, len(texts), 1000), desc="Tokenizing", unit="k texts", delay=2):
                rows = []
                for text, prompt, written in _encode(texts[start : start + 1000], tokenizer):
                    counts["longest_prompt"] = max(counts["longest_prompt"], len(prompt.ids))
                    if not _has_room(prompt, written, max_length):
                        counts["num_crowded"] += 1
                        continue
                    rows.append(_as_row(text, prompt, written, tokenizer, max_length, learn_prompt))
                    counts["num_cut"] += len(rows[-1]["input_ids"]) - 2 < len(prompt.ids) + len(written.ids)
                    counts["num_tokens"] += len(rows[-1]["input_ids"])
                columns = {name: [row[name] for row in rows] for name in TOKENS}
                stream.write_batch(pa.record_batch(columns, schema=TOKENS.arrow_schema))
        with new_path(path.with_suffix(".json")) as counted:  # first: who finds the tokens finds their counts
            counted.write_text(json.dumps(counts))


def _has_room(prompt: "_Encoded", written: "_Encoded", max_length: int) -> bool:
    """Whether enough of a text is kept behind its prompt: cut to less, it would teach the model to end at once."""
    return not prompt.ids or max_length - 2 - len(prompt.ids) >= min(FEWEST_TOKENS, len(written.ids))


class _Encoded(NamedTuple):
    ids: list[int]
    ends: list[int]  # where each token ends, in characters


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, _Encoded, _Encoded]]:
    """Each text, its prompt's tokens, and those of what is written for it."""
    sides = []
    for side in zip(*map(parts, texts), strict=True):
        encoded = tokenizer(
            list(side), add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
        )
        ends = [[end for _, end in offsets] for offsets in encoded["offset_mapping"]]
        sides.append(map(_Encoded, encoded["input_ids"], ends))
    return zip(texts, *sides, strict=True)


def _as_row(
    text: str, prompt: _Encoded, written: _Encoded, tokenizer: PreTrainedTokenizerBase, max_length: int, learn_prompt
) -> dict:
    """A row of the data set."""
    _, learnt = parts(text)
    kept = [*prompt.ids, *written.ids][: max_length - 2]
    num_prompt = min(len(prompt.ids), len(kept))
    num_written = len(kept) - num_prompt
    num_chars = len(learnt) if num_written == len(written.ids) else [0, *written.ends][num_written]
    if learn_prompt:
        num_chars += [0, *prompt.ends][num_prompt]
    else:  # the space between prompt and text is not the text's own
        num_chars = max(num_chars - (len(learnt) - len(learnt.lstrip())), 0)
    return {
        "input_ids": [tokenizer.bos_token_id, *kept, tokenizer.eos_token_id],
        "prompt_length": 1 if learn_prompt else 1 + num_prompt,
        "num_chars": num_chars,
    }


def fill_up(dataset: Dataset, multiple: int, bos_token_id: int) -> Dataset:
    """Makes a data set's length a multiple of the texts a step takes, with texts that count nothing.

    Each is a lone `<|startoftext|>`: it has no next token, so no label. Without them the last step of an
    epoch would be short on one process and, on several, be filled with texts seen already: the same run
    would not be the same on 1 and 2 processes.
    """
    num_missing = -len(dataset) % multiple
    if num_missing == 0:
        return dataset
    empty = {"input_ids": [[bos_token_id]], "prompt_length": [1], "num_chars": [0]}
    empty = Dataset.from_dict({name: values * num_missing for name, values in empty.items()}, TOKENS)
    return concatenate_datasets([dataset, empty])


def count_tokens(dataset: Dataset) -> np.ndarray:
    """Tokens of each text, int64 [texts], without a walk through them."""
    return pc.list_value_length(dataset.with_format("arrow")[:]["input_ids"]).to_numpy().astype(np.int64)
