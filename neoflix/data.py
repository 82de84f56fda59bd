"""The way of the data, once it is read (reading.py): split -> tokenise -> batch -> collate.

Shapes: B = 1 row a batch where texts are packed, else texts; T tokens a row.
"""

import hashlib
import heapq
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase
from transformers.trainer_pt_utils import get_length_grouped_indices

from neoflix.attention import lay_out_texts
from neoflix.cache import in_cache, new_path
from neoflix.console import progress, say
from neoflix.errors import UserError
from neoflix.loss import IGNORED
from neoflix.template import parts
from neoflix.words import split_words

# `num_given`: how many tokens at a text's beginning are given, not learnt. `num_chars`: characters of what is learnt.
TOKENS = Features({"input_ids": List(Value("int32")), "num_given": Value("int32"), "num_chars": Value("int32")})


FEWEST_TOKENS = 8  # of a text that must be kept behind its prompt
MOST_CROWDED = 0.1  # share of the texts that may be left out for want of room


class TextSplit(NamedTuple):
    """Texts to learn from and texts to measure on; no text and no twin of one stands in both."""

    train: list[str]
    validation: list[str]


# ---- split ----------------------------------------------------------------------------------------------


def split_texts(texts: list[str], validation_fraction: float) -> TextSplit:
    """Splits by content: a hash of each text decides, so twins stay together and nothing else matters.

    Row order, seed and world size do not move a text, nor does its prompt; a larger fraction only adds to the
    validation side. Letter case, spacing and punctuation do not make a text another one. Both sides get at least one
    text.
    """
    if validation_fraction == 0:
        return TextSplit(texts, [])
    ranks = [_rank(text) for text in texts]
    lowest, highest = min(ranks), max(ranks)
    if lowest == highest:
        raise UserError("all texts are the same: one distinct text cannot be both learnt from and measured on")
    is_held_out = [rank == lowest or (rank < validation_fraction and rank != highest) for rank in ranks]
    return TextSplit(
        train=[text for text, held_out in zip(texts, is_held_out, strict=True) if not held_out],
        validation=[text for text, held_out in zip(texts, is_held_out, strict=True) if held_out],
    )


def _rank(text: str) -> float:
    """A number in [0, 1) that depends on a text's words alone, spread evenly."""
    digest = hashlib.blake2b(" ".join(split_words(parts(text)[1])).encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


# ---- tokenise -------------------------------------------------------------------------------------------


class Tokens(NamedTuple):
    """A side's tokens: `input_ids` (list of int32), `num_given` (tokens that are not targets) and `num_chars` (of what
    is a target and was kept); and what was lost of its texts."""

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

    The file's name is a hash of texts, tokenizer and `max_length`; whoever comes first writes it, under
    another name until it is whole: several may, at once, where nodes share the folder. Tokens are never all in
    memory. A control token's name inside a text is text. Prompt and text are made into tokens each by itself, as in
    sampling. A text of more than `max_length` tokens (prompt and both special ones counted) is cut before its end
    token; it is left out where its prompt leaves room for fewer than `FEWEST_TOKENS` of it.

    Args:
        learn_prompt: whether prompts are targets too; of texts without one everything but `<|startoftext|>` is.

    Raises:
        UserError: where the cache cannot be written.
    """
    path = cache_dir / f"{name_tokens(texts, tokenizer, max_length, learn_prompt)}.arrow"
    with in_cache(cache_dir):
        if not path.is_file():
            _write_tokens(texts, tokenizer, max_length, path, learn_prompt)
        counts = {"num_crowded": 0, "longest_prompt": 0} | json.loads(path.with_suffix(".json").read_text())
        return Tokens(Dataset.from_file(str(path), split=path.stem), **counts)


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
        "num_given": 1 if learn_prompt else 1 + num_prompt,
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
    empty = {"input_ids": [[bos_token_id]], "num_given": [1], "num_chars": [0]}
    empty = Dataset.from_dict({name: values * num_missing for name, values in empty.items()}, TOKENS)
    return concatenate_datasets([dataset, empty])


# ---- batch ----------------------------------------------------------------------------------------------


class EpochOrder(Sampler[int]):
    """Texts in an order that depends on the seed and the epoch alone: a resumed run, or another number of processes,
    has the same one.

    Args:
        lengths_N: tokens of each text.
        texts_per_step: of all processes; with `by_length`, these are about equally long.
        by_length: group texts by length (`--train_sampling_strategy group_by_length`).
    """

    def __init__(self, lengths_N: np.ndarray, texts_per_step: int, seed: int, by_length: bool):
        self.lengths_N, self.texts_per_step, self.seed, self.by_length = lengths_N, texts_per_step, seed, by_length
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths_N)

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        if self.by_length:
            yield from get_length_grouped_indices(self.lengths_N.tolist(), self.texts_per_step, generator=generator)
        else:
            yield from torch.randperm(len(self), generator=generator).tolist()


class TokenBatches(Sampler[list[int]]):
    """Batches of about equal numbers of tokens, none above a budget; of these, one process's.

    Texts go, longest first, each to the batch that is emptiest so far (Graham's longest-processing-time rule, 1969:
    at most a third above the best there is, and next to it where texts are many): no process waits for another.
    Which of the texts of one length comes where, and the batches' order, is drawn anew each epoch; the batches'
    sizes and their number, a multiple of what a step takes, are the same in every epoch.

    Args:
        lengths_N: tokens of each text; as many texts as a step takes batches, or a multiple (`fill_up`).
        budget: most tokens a batch may have.
        batches_per_step: processes times accumulated batches.
        rank, world_size: this process takes every `world_size`-th batch, from the `rank`-th on.

    Raises:
        UserError: where a single text is longer than the budget.
    """

    def __init__(
        self, lengths_N: np.ndarray, budget: int, batches_per_step: int, rank: int, world_size: int, seed: int
    ):
        if (longest := lengths_N.max()) > budget:
            raise UserError(
                f"--tokens_per_device_batch {budget}: the longest text has {longest} tokens; raise it to that, "
                f"or cut texts with --max_length {budget}"
            )
        self.lengths_N, self.rank, self.world_size, self.seed, self.epoch = lengths_N, rank, world_size, seed, 0
        descending = (-np.sort(-lengths_N)).tolist()
        num_batches = -(-sum(descending) // budget)
        while True:
            num_batches = min(-(-num_batches // batches_per_step) * batches_per_step, len(descending))
            self.ranks_of_batches, fullest = self._deal(descending, num_batches)
            if fullest <= budget:
                break
            num_batches += 1 + num_batches // 100

    @staticmethod
    def _deal(descending: list[int], num_batches: int) -> tuple[list[list[int]], int]:
        """(which texts, counted from the longest, each batch gets; tokens of the fullest)"""
        batches = [[] for _ in range(num_batches)]
        emptiest_first = [(0, batch) for batch in range(num_batches)]
        for rank, length in enumerate(descending):
            num_tokens, batch = emptiest_first[0]
            heapq.heapreplace(emptiest_first, (num_tokens + length, batch))
            batches[batch].append(rank)
        return batches, max(emptiest_first)[0]

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.ranks_of_batches) // self.world_size

    def __iter__(self):
        rng = np.random.default_rng([self.seed, self.epoch])
        shuffled_N = rng.permutation(len(self.lengths_N))
        longest_first_N = shuffled_N[np.argsort(-self.lengths_N[shuffled_N], kind="stable")]
        for batch in rng.permutation(len(self.ranks_of_batches))[self.rank :: self.world_size]:
            yield longest_first_N[self.ranks_of_batches[batch]].tolist()


def count_tokens(dataset: Dataset) -> np.ndarray:
    """Tokens of each text, int64 [texts], without a walk through them."""
    return pc.list_value_length(dataset.with_format("arrow")[:]["input_ids"]).to_numpy().astype(np.int64)


# ---- collate --------------------------------------------------------------------------------------------


class PackedCollator:
    """Lays texts end to end in one row: nothing is padding, and attention keeps the texts apart.

    Labels are the tokens themselves (the model shifts them), but for those that are given, a prompt's and the first of
    each text: no text is asked to foresee the next one. `use_cache` is off because training has no use for one.
    """

    def __call__(self, examples: list[dict]) -> dict:
        """-> input_ids, position_ids, labels: long [1, T]; attention_mask: the texts' layout; use_cache: False."""
        lengths = [len(example["input_ids"]) for example in examples]
        input_ids = torch.tensor([i for example in examples for i in example["input_ids"]]).unsqueeze(0)
        position_ids = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
        num_given = [example["num_given"] for example in examples]
        num_given_1T = torch.tensor(num_given).repeat_interleave(torch.tensor(lengths)).unsqueeze(0)
        return {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "attention_mask": lay_out_texts(lengths),
            "labels": input_ids.masked_fill(position_ids < num_given_1T, IGNORED),
            "use_cache": False,
        }


class PaddedCollator:
    """Pads texts to the longest, on the right: for models whose attention does not keep texts apart."""

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, examples: list[dict]) -> dict:
        """-> input_ids, attention_mask, labels: long [B, T]; padding is never a label, nor what is given."""
        rows = [torch.tensor(example["input_ids"]) for example in examples]
        input_ids = pad_sequence(rows, batch_first=True, padding_value=self.pad_token_id)
        is_real = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        num_given_B1 = torch.tensor([[example["num_given"]] for example in examples])
        is_given = torch.arange(input_ids.shape[1]) < num_given_B1
        labels = input_ids.masked_fill((is_real == 0) | is_given, IGNORED)
        return {"input_ids": input_ids, "attention_mask": is_real, "labels": labels}
