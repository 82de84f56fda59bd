"""From examples to tokens, kept in a memory-mapped cache file."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from neoflix.data.split import TextSplit
from neoflix.data.template import Example
from neoflix.runtime.cache import in_cache, new_path
from neoflix.runtime.console import progress, say
from neoflix.runtime.errors import UserError

# `prompt_length`: tokens at the beginning that are not targets. `num_chars`: characters of the targets.
TOKENS = Features({"input_ids": List(Value("int32")), "prompt_length": Value("int32"), "num_chars": Value("int32")})

FILE_VERSION = 3  # of the columns above and of the counts beside them

FEWEST_TOKENS = 8  # of a completion that must fit behind its prompt

MOST_LEFT_OUT = 0.1  # share of the texts that may be left out because their prompts leave no room


class Tokens(NamedTuple):
    """The tokens of one side of the split, and what had to be cut."""

    dataset: Dataset  # a row for each text that was kept, with the columns `TOKENS`
    num_tokens: int
    num_cut: int  # texts that were cut
    num_left_out: int  # texts whose prompts leave no room for them
    longest_prompt: int  # tokens
    name: str  # `name_tokens`: the identity of the data in a run's record


class TokenSplit(NamedTuple):
    """The tokens of both sides of the split."""

    train: Tokens
    validation: Tokens


def tokenize_split(
    split: TextSplit, tokenizer: PreTrainedTokenizerBase, max_length: int, cache_dir: Path, loss_on_prompt: bool = False
) -> TokenSplit:
    """Tokenizes both sides. Prints how many tokens they have, and how many texts were cut or left out.

    Raises:
        UserError: as `tokenize_texts` and `check_room`.
    """
    tokens = TokenSplit(*(tokenize_texts(side, tokenizer, max_length, cache_dir, loss_on_prompt) for side in split))
    check_room(split, tokens, max_length)
    for name, side in tokens._asdict().items():
        cut = f"; {side.num_cut:,} texts longer than {max_length} tokens were cut" if side.num_cut else ""
        left_out = f"; {side.num_left_out:,} were left out: their prompts fill {max_length} tokens"
        say(
            f"{name}: {len(side.dataset):,} texts, {side.num_tokens:,} tokens{cut}"
            f"{left_out if side.num_left_out else ''}"
        )
    warn_of_control_tokens([*split.train, *split.validation], tokenizer)
    return tokens


def check_room(sides: list[list[Example]], tokens: list[Tokens], max_length: int) -> None:
    """Checks that the prompts leave room for most texts of these sides of the split.

    Raises:
        UserError: if more than a tenth of the texts, or all texts of one side, were left out.
    """
    num_left_out, num_texts = sum(side.num_left_out for side in tokens), sum(map(len, sides))
    is_empty = any(side and not len(kept.dataset) for side, kept in zip(sides, tokens, strict=True))
    if is_empty or num_left_out > MOST_LEFT_OUT * num_texts:
        needed = max(side.longest_prompt for side in tokens) + FEWEST_TOKENS + 2
        raise UserError(
            f"--max_length {max_length}: the prompts of {num_left_out:,} of {num_texts:,} texts leave room for fewer "
            f"than {FEWEST_TOKENS} tokens of the text; use {needed} or more, if the model's window allows it, or "
            "a shorter --template"
        )


def warn_of_control_tokens(examples: list[Example], tokenizer: PreTrainedTokenizerBase) -> None:
    """Prints a warning if texts contain the names of control tokens, which are tokenized as plain text."""
    for name in dict.fromkeys([tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token]):
        if name and (count := sum(name in example.whole for example in examples)):
            say(
                f"warning: {count:,} of {len(examples):,} texts contain {name!r}, which is read as plain text, not as "
                "the control token, and the model will write it; remove it: each text gets its own control tokens"
            )


def tokenize_texts(
    examples: list[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    cache_dir: Path,
    loss_on_prompt: bool = False,
) -> Tokens:
    """Tokenizes each text as `<|startoftext|> prompt completion <|endoftext|>`, memory-mapped from a cache file.

    Prompt and completion are tokenized separately, as in sampling. The name of a control token inside a text is plain
    text. A text of more than `max_length` tokens (prompt and both control tokens included) is cut before its end token;
    it is left out if its prompt leaves room for fewer than `FEWEST_TOKENS` tokens of it.

    The file is named by `name_tokens`. The first process writes it, under another name until it is complete; on nodes
    that share the folder, several may do so at once. The tokens are never all in memory.

    Args:
        loss_on_prompt: whether prompts are targets too. Of a text without a prompt, all but `<|startoftext|>` is.

    Raises:
        UserError: if the cache cannot be written.
    """
    name = name_tokens(examples, tokenizer, max_length, loss_on_prompt)
    path = cache_dir / f"{name}.{FILE_VERSION}.arrow"
    with in_cache(cache_dir):
        if not path.is_file():
            write_tokens(examples, tokenizer, max_length, path, loss_on_prompt)
        counts = json.loads(path.with_suffix(".json").read_text())
        return Tokens(Dataset.from_file(str(path)), **counts, name=name)


def name_tokens(
    examples: list[Example], tokenizer: PreTrainedTokenizerBase, max_length: int, loss_on_prompt: bool = False
) -> str:
    """The name of these texts' tokens: a hash of all that they depend on. A run's record has it as "data"."""
    version = 3 if any(example.prompt for example in examples) else 2  # before 3, no text was left out
    facts = f"{version} {max_length} {tokenizer.bos_token_id} {tokenizer.eos_token_id} {loss_on_prompt}"
    digest = hashlib.sha256(facts.encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    for example in examples:
        digest.update(f"{example.prompt}\0{example.completion}\0".encode())
    return f"tokens-{digest.hexdigest()[:24]}"


def write_tokens(
    examples: list[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    path: Path,
    loss_on_prompt: bool = False,
) -> None:
    """Writes an Arrow file with the columns `TOKENS`, a thousand texts at a time, and their counts beside it."""
    counts = {"num_tokens": 0, "num_cut": 0, "num_left_out": 0, "longest_prompt": 0}
    with new_path(path) as unfinished:
        with pa.OSFile(str(unfinished), "wb") as file, pa.ipc.new_stream(file, TOKENS.arrow_schema) as stream:
            for start in progress(range(0, len(examples), 1000), desc="Tokenizing", unit="k texts", delay=2):
                rows = []
                for example, prompt, completion in _encode(examples[start : start + 1000], tokenizer):
                    counts["longest_prompt"] = max(counts["longest_prompt"], len(prompt.ids))
                    if not _has_room(prompt, completion, max_length):
                        counts["num_left_out"] += 1
                        continue
                    rows.append(_to_row(example, prompt, completion, tokenizer, max_length, loss_on_prompt))
                    counts["num_cut"] += len(rows[-1]["input_ids"]) - 2 < len(prompt.ids) + len(completion.ids)
                    counts["num_tokens"] += len(rows[-1]["input_ids"])
                columns = {name: [row[name] for row in rows] for name in TOKENS}
                stream.write_batch(pa.record_batch(columns, schema=TOKENS.arrow_schema))
        with new_path(path.with_suffix(".json")) as counted:  # before the tokens: whoever finds them finds their counts
            counted.write_text(json.dumps(counts))


class _Encoded(NamedTuple):
    ids: list[int]
    ends: list[int]  # of each token, in characters


def _encode(
    examples: list[Example], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[Example, _Encoded, _Encoded]]:
    """Each example, with its prompt and its completion encoded."""
    sides = []
    for texts in ([example.prompt for example in examples], [example.completion for example in examples]):
        encoded = tokenizer(
            texts, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
        )
        ends = [[end for _, end in offsets] for offsets in encoded["offset_mapping"]]
        sides.append(map(_Encoded, encoded["input_ids"], ends))
    return zip(examples, *sides, strict=True)


def _has_room(prompt: _Encoded, completion: _Encoded, max_length: int) -> bool:
    """Whether enough of a completion fits behind its prompt: cut shorter, it would teach the model to end at once."""
    return not prompt.ids or max_length - 2 - len(prompt.ids) >= min(FEWEST_TOKENS, len(completion.ids))


def _to_row(
    example: Example,
    prompt: _Encoded,
    completion: _Encoded,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    loss_on_prompt: bool,
) -> dict:
    kept = [*prompt.ids, *completion.ids][: max_length - 2]
    num_prompt = min(len(prompt.ids), len(kept))
    num_completion = len(kept) - num_prompt
    is_whole = num_completion == len(completion.ids)
    num_chars = len(example.completion) if is_whole else [0, *completion.ends][num_completion]
    if loss_on_prompt:
        num_chars += [0, *prompt.ends][num_prompt]
    else:  # without the space between prompt and completion
        num_chars = max(num_chars - (len(example.completion) - len(example.completion.lstrip())), 0)
    return {
        "input_ids": [tokenizer.bos_token_id, *kept, tokenizer.eos_token_id],
        "prompt_length": 1 if loss_on_prompt else 1 + num_prompt,
        "num_chars": num_chars,
    }


def fill_up(dataset: Dataset, multiple: int, bos_token_id: int) -> Dataset:
    """Makes a data set's length a multiple of the texts per step, with texts that have no target.

    Each of them is a lone `<|startoftext|>`, which has no next token. Without them, the last step of an epoch would be
    short on one process and, on several, be filled with texts that were already trained on: the same run would differ
    between 1 and 2 processes.
    """
    num_missing = -len(dataset) % multiple
    if num_missing == 0:
        return dataset
    empty = {"input_ids": [[bos_token_id]], "prompt_length": [1], "num_chars": [0]}
    empty = Dataset.from_dict({name: values * num_missing for name, values in empty.items()}, TOKENS)
    return concatenate_datasets([dataset, empty])


def count_tokens(dataset: Dataset) -> np.ndarray:
    """Tokens of each text, int64 [texts], without reading the tokens."""
    return pc.list_value_length(dataset.with_format("arrow")[:]["input_ids"]).to_numpy().astype(np.int64)
