"""The way of the data: read -> clean -> split -> tokenise -> batch -> collate.

Shapes: B = 1 row a batch where texts are packed, else texts; T tokens a row.
"""

import hashlib
import heapq
import json
import urllib.request
import uuid
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets
from datasets import config as datasets_config
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase

from neoflix.attention import lay_out_texts
from neoflix.config import ROOT
from neoflix.distributed import progress, say
from neoflix.loss import IGNORED
from neoflix.quality import split_words

NETFLIX_PATH = ROOT / "data" / "netflix_titles.csv"
NETFLIX_URL = (
    "https://raw.githubusercontent.com/rfordatascience/tidytuesday/main/data/2021/2021-04-20/netflix_titles.csv"
)
SAMPLE_PATH = ROOT / "data" / "sample_titles.csv"

TOKENS = Features({"input_ids": List(Value("int32")), "num_chars": Value("int32")})


class TextSplit(NamedTuple):
    """Texts to learn from and texts to measure on; no text and no twin of one stands in both."""

    train: list[str]
    validation: list[str]


# ---- read -----------------------------------------------------------------------------------------------


def find_dataset(name: str) -> Path:
    """A file for `--dataset`: 'netflix' (downloaded if need be), 'sample', or a path."""
    if name == "sample":
        return SAMPLE_PATH
    if name == "netflix":
        if not NETFLIX_PATH.is_file():
            download_netflix(NETFLIX_PATH)
        return NETFLIX_PATH
    path = Path(name).expanduser()
    if path.is_dir():
        raise ValueError(f"--dataset {name}: is a folder; name one CSV, TSV, JSONL or Parquet file in it")
    if not path.is_file():
        raise ValueError(f"--dataset {name}: no such file (or say 'netflix' or 'sample')")
    return path


def download_netflix(path: Path, url: str = NETFLIX_URL) -> None:
    """Fetches the Netflix catalogue (3 MB, no login); `path` appears whole and checked, or not at all."""
    say(f"Downloading the Netflix titles to {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            partial.write_bytes(response.read())
        if len(read_texts(partial, "description", suffix=".csv")) < 1000:
            raise ValueError("the file is too short to be the catalogue")
        partial.replace(path)
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise ValueError(
            f"--dataset netflix: could not be downloaded from {url} ({reason}); save that file as {path}, "
            "or try --dataset sample"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def read_texts(path: Path, column: str, suffix: str | None = None) -> list[str]:
    """Texts of one column, trimmed, rows without text left out; otherwise as they stand, in the file's order.

    ValueError, in one sentence, for every file that is not a table with such a column of text.
    """
    suffix = (suffix or path.suffix).lower()
    readers = {".csv": _read_separated, ".tsv": _read_separated, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if suffix not in readers:
        raise ValueError(f"--dataset {path}: ends in {suffix or 'nothing'!r}; should be .csv, .tsv, .jsonl or .parquet")
    if path.stat().st_size == 0:
        raise ValueError(f"--dataset {path}: the file is empty")
    try:
        values = readers[suffix](path, column)
    except UnicodeDecodeError as error:
        raise ValueError(f"--dataset {path}: not UTF-8 at byte {error.start}; save it as UTF-8") from error
    except OSError as error:
        raise ValueError(f"--dataset {path}: cannot be read ({error.strerror or error})") from error
    if len(values) == 0:
        raise ValueError(f"--dataset {path}: has a header but no rows")
    return _clean(values, path, column)


def _clean(values: pd.Series, path: Path, column: str) -> list[str]:
    values = values.dropna()
    if pd.api.types.is_numeric_dtype(values) and len(values):
        raise ValueError(f"--text_column {column}: holds numbers in {path}; name a column of texts")
    if not values.map(type).eq(str).all():
        raise ValueError(f"--text_column {column}: holds values that are not text in {path}; name a column of texts")
    texts = [text for text in values.str.strip() if text]
    if not texts:
        raise ValueError(f"--text_column {column}: every row of {path} is empty there")
    if pd.to_numeric(pd.Series(texts), errors="coerce").notna().all():
        raise ValueError(f"--text_column {column}: holds numbers in {path}; name a column of texts")
    return texts


def _require_column(path: Path, column: str, columns) -> None:
    if column not in columns:
        raise ValueError(f"--text_column {column}: not a column of {path}; it has {', '.join(map(str, columns))}")


def _read_separated(path: Path, column: str) -> pd.Series:
    # pandas' own parser fills short rows up in silence; pyarrow's refuses rows of the wrong width.
    options = {"sep": "\t" if path.suffix.lower() == ".tsv" else ",", "dtype": str, "keep_default_na": False}
    try:
        columns = list(pd.read_csv(path, nrows=0, encoding="utf-8", **options).columns)
        _require_column(path, column, columns)
        return pd.read_csv(path, usecols=[column], engine="pyarrow", **options)[column]
    except pd.errors.EmptyDataError as error:
        raise ValueError(f"--dataset {path}: the file is empty") from error
    except (pd.errors.ParserError, pa.ArrowInvalid) as error:
        if "UTF8" in str(error):
            raise ValueError(f"--dataset {path}: not UTF-8 ({error}); save it as UTF-8") from error
        message = " ".join(str(error).split())
        raise ValueError(
            f"--dataset {path}: a row has too many or too few fields, or a quote is not closed ({message[:160]})"
        ) from error


def _read_jsonl(path: Path, column: str) -> pd.Series:
    values = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"--dataset {path}: line {number} is not valid JSON ({error})") from error
            if not isinstance(row, dict):
                raise ValueError(f"--dataset {path}: line {number} is not a JSON object, {{...}}")
            if not values:
                _require_column(path, column, row)
            values.append(row.get(column))
    return pd.Series(values, dtype=object)


def _read_parquet(path: Path, column: str) -> pd.Series:
    try:
        _require_column(path, column, pq.read_schema(path).names)
        return pd.read_parquet(path, columns=[column])[column]
    except pa.ArrowInvalid as error:
        raise ValueError(f"--dataset {path}: not a Parquet file ({error})") from error


# ---- split ----------------------------------------------------------------------------------------------


def split_texts(texts: list[str], validation_fraction: float) -> TextSplit:
    """Splits by content: a hash of each text decides, so twins stay together and nothing else matters.

    Row order, seed and world size do not move a text; a larger fraction only adds to the validation side.
    Letter case, spacing and punctuation do not make a text another one. Both sides get at least one text.
    """
    if validation_fraction == 0:
        return TextSplit(texts, [])
    ranks = [_rank(text) for text in texts]
    lowest, highest = min(ranks), max(ranks)
    if lowest == highest:
        raise ValueError("all texts are the same: one distinct text cannot be both learnt from and measured on")
    is_held_out = [rank == lowest or (rank < validation_fraction and rank != highest) for rank in ranks]
    return TextSplit(
        train=[text for text, held_out in zip(texts, is_held_out, strict=True) if not held_out],
        validation=[text for text, held_out in zip(texts, is_held_out, strict=True) if held_out],
    )


def _rank(text: str) -> float:
    """A number in [0, 1) that depends on a text's words alone, spread evenly."""
    digest = hashlib.blake2b(" ".join(split_words(text)).encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


# ---- tokenise -------------------------------------------------------------------------------------------


def default_cache_dir() -> Path:
    """Token caches lie beside Hugging Face's data set cache (HF_DATASETS_CACHE moves both)."""
    return Path(datasets_config.HF_DATASETS_CACHE) / "neoflix"


def tokenize_split(
    split: TextSplit, tokenizer: PreTrainedTokenizerBase, max_length: int, cache_dir: Path
) -> tuple[Dataset, Dataset]:
    """Tokens of both sides, (train, validation), and one line that says how many, and how many texts were cut."""
    sides = []
    for name, texts in split._asdict().items():
        dataset, num_tokens, num_cut = tokenize_texts(texts, tokenizer, max_length, cache_dir)
        cut = f"; {num_cut:,} texts longer than {max_length} tokens were cut" if num_cut else ""
        say(f"{name}: {len(dataset):,} texts, {num_tokens:,} tokens{cut}")
        sides.append(dataset)
    return tuple(sides)


def tokenize_texts(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, max_length: int, cache_dir: Path
) -> tuple[Dataset, int, int]:
    """`<|startoftext|> text <|endoftext|>` as ids, memory-mapped from a cache file.

    The file's name is a hash of texts, tokenizer and `max_length`; whoever comes first writes it, under
    another name until it is whole: several may, at once, where nodes share the folder. Tokens are never all in
    memory. A control token's name inside a text is text. A text of more than `max_length` tokens (both special
    ones counted) is cut before its end token.

    Returns:
        Dataset with `input_ids` (list of int32) and `num_chars` (characters of the text that was kept), its
        number of tokens, and how many texts were cut.
    """
    path = cache_dir / f"{name_tokens(texts, tokenizer, max_length)}.arrow"
    if not path.is_file():
        _write_tokens(texts, tokenizer, max_length, path)
    counts = json.loads(path.with_suffix(".json").read_text())
    return Dataset.from_file(str(path), split=path.stem), counts["num_tokens"], counts["num_cut"]


def name_tokens(texts: list[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> str:
    """What these texts' tokens are called: a hash of all that they depend on. A run's record has it as "data"."""
    digest = hashlib.sha256(f"1 {max_length} {tokenizer.bos_token_id} {tokenizer.eos_token_id}".encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    for text in texts:
        digest.update(text.encode())
        digest.update(b"\0")
    return f"tokens-{digest.hexdigest()[:24]}"


def _write_tokens(texts: list[str], tokenizer: PreTrainedTokenizerBase, max_length: int, path: Path) -> None:
    num_tokens = num_cut = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    with pa.OSFile(str(unfinished), "wb") as file, pa.ipc.new_stream(file, TOKENS.arrow_schema) as stream:
        for start in progress(range(0, len(texts), 1000), desc="Tokenizing", unit="k texts", delay=2):
            some = texts[start : start + 1000]
            encoded = tokenizer(
                some, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
            )
            rows = {"input_ids": [], "num_chars": []}
            for text, ids, offsets in zip(some, encoded["input_ids"], encoded["offset_mapping"], strict=True):
                is_cut = len(ids) > max_length - 2
                num_cut += is_cut
                num_tokens += min(len(ids) + 2, max_length)
                rows["input_ids"].append([tokenizer.bos_token_id, *ids[: max_length - 2], tokenizer.eos_token_id])
                rows["num_chars"].append(offsets[max_length - 3][1] if is_cut else len(text))
            stream.write_batch(pa.record_batch(rows, schema=TOKENS.arrow_schema))
    counts = unfinished.with_suffix(".json")
    counts.write_text(json.dumps({"num_tokens": num_tokens, "num_cut": num_cut}))
    counts.replace(path.with_suffix(".json"))
    unfinished.replace(path)


def fill_up(dataset: Dataset, multiple: int, bos_token_id: int) -> Dataset:
    """Makes a data set's length a multiple of the texts a step takes, with texts that count nothing.

    Each is a lone `<|startoftext|>`: it has no next token, so no label. Without them the last step of an
    epoch would be short on one process and, on several, be filled with texts seen already: the same run
    would not be the same on 1 and 2 processes.
    """
    num_missing = -len(dataset) % multiple
    if num_missing == 0:
        return dataset
    empty = Dataset.from_dict({"input_ids": [[bos_token_id]] * num_missing, "num_chars": [0] * num_missing}, TOKENS)
    return concatenate_datasets([dataset, empty])


# ---- batch ----------------------------------------------------------------------------------------------


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
        ValueError: where a single text is longer than the budget.
    """

    def __init__(
        self, lengths_N: np.ndarray, budget: int, batches_per_step: int, rank: int, world_size: int, seed: int
    ):
        if (longest := lengths_N.max()) > budget:
            raise ValueError(
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

    Labels are the tokens themselves (the model shifts them), but for the first of each text: no text is
    asked to foresee the next one. `use_cache` is off because training has no use for one.
    """

    def __call__(self, examples: list[dict]) -> dict:
        """-> input_ids, position_ids, labels: long [1, T]; attention_mask: the texts' layout; use_cache: False."""
        lengths = [len(example["input_ids"]) for example in examples]
        input_ids = torch.tensor([i for example in examples for i in example["input_ids"]]).unsqueeze(0)
        position_ids = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
        return {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "attention_mask": lay_out_texts(lengths),
            "labels": input_ids.masked_fill(position_ids == 0, IGNORED),
            "use_cache": False,
        }


class PaddedCollator:
    """Pads texts to the longest, on the right: for models whose attention does not keep texts apart."""

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, examples: list[dict]) -> dict:
        """-> input_ids, attention_mask, labels: long [B, T]; padding is never a label."""
        rows = [torch.tensor(example["input_ids"]) for example in examples]
        input_ids = pad_sequence(rows, batch_first=True, padding_value=self.pad_token_id)
        is_real = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        labels = input_ids.masked_fill(is_real == 0, IGNORED)
        return {"input_ids": input_ids, "attention_mask": is_real, "labels": labels}
