"""Lengths of the texts in tokens: counted by an earlier run, or estimated from a sample."""

import hashlib
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

from neoflix.data.sources import find_local_dataset, sample_examples
from neoflix.data.tables import find_text_files
from neoflix.data.template import Template
from neoflix.model.packaged import SMOLLM2, packaged_folder
from neoflix.model.shape import Shape
from neoflix.runtime.cache import default_cache_dir, in_cache, new_path

CHARS_PER_TOKEN = 4.8  # of the 7,787 Netflix descriptions with GPT-2's tokenizer, without special tokens
SAMPLE_TEXTS = 500


@dataclass(frozen=True)
class Texts:
    """Token counts of the data, with special tokens."""

    num_train: int
    num_validation: int
    mean: float  # tokens per text
    deviation: float
    longest: int
    source: str  # where the counts come from

    def of_batch(self, num_texts: int, packed: bool = True) -> int:
        """Most tokens of a batch of texts: mean and two standard deviations. If texts are padded to the longest of
        their batch, one batch of each epoch has the longest of all."""
        num_texts = min(num_texts, max(self.num_train, 1))
        if not packed:
            return num_texts * self.longest
        likely = num_texts * self.mean + 2 * self.deviation * math.sqrt(num_texts)
        return math.ceil(min(likely, num_texts * self.longest))

    def of_budget(self, num_tokens: int, packed: bool) -> int:
        """Most tokens that are computed for a batch of `num_tokens` real ones: more if texts are padded."""
        if packed:
            return num_tokens
        return self.of_batch(max(1, round(num_tokens / self.mean)), packed)

    def padding(self, num_texts: int | None, budget: int | None, packed: bool) -> float:
        """Tokens computed for each real one: the longest text of a batch relative to their mean, for a normal
        distribution of lengths (expected maximum of n: Blom, 1958)."""
        if packed:
            return 1.0
        n = min(num_texts or max(1, round(budget / self.mean)), max(self.num_train, 1))
        longest = self.mean + self.deviation * NormalDist().inv_cdf((n - 0.375) / (n + 0.25))
        return min(longest, self.longest) / self.mean


def count_texts(args, shape: Shape) -> Texts:
    """Token counts of the data, as an earlier run counted them, or estimated from the file's first rows."""
    path = _counts_file(args, shape.window)
    with in_cache(_cache_dir(args)):
        if path and path.is_file():
            return Texts(**json.loads(path.read_text()), source="counted by an earlier run")
    return estimate_texts(find_local_dataset(args.dataset, _cache_dir(args)), args, shape.window)


def remember_counts(args, window: int, lengths_N, num_validation: int) -> None:
    """Keeps the token counts of the training texts, int [texts], for later plans. Called by one process."""
    if path := _counts_file(args, window):
        counts = {
            "num_train": len(lengths_N),
            "num_validation": num_validation,
            "mean": float(lengths_N.mean()),
            "deviation": float(lengths_N.std()),
            "longest": int(lengths_N.max()),
        }
        with in_cache(path.parent), new_path(path) as unfinished:  # another run may be reading it
            unfinished.write_text(json.dumps(counts))


COUNTS_FORMAT = 3  # raised when the same file may give other texts than before


def _counts_file(args, window: int) -> Path | None:
    """The file with the counts of these texts, named by data file (or every file of a folder), column, template,
    fraction held out, window and tokenizer (the model's name). None if the data is not on this machine."""
    data = find_local_dataset(args.dataset, _cache_dir(args))
    if data is None:
        return None
    files = find_text_files(data) if data.is_dir() else [data]
    states = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    key = [COUNTS_FORMAT, states, args.validation_fraction, window]
    key += [args.text_column, args.template, str(args.model_name_or_path)]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
    return _cache_dir(args) / f"counts-{digest}.json"


def _cache_dir(args) -> Path:
    return Path(args.cache_dir) if args.cache_dir else default_cache_dir()


def estimate_texts(path: Path | None, args, window: int) -> Texts:
    """Estimates from the first texts of the file: the number of rows by the file's size, and tokens by the model's own
    tokenizer or else by characters. Without a file the counts are those of the Netflix descriptions."""
    if path is None:
        is_netflix = args.dataset == "netflix"
        netflix = "counts of the Netflix descriptions, as published"
        source = netflix if is_netflix else f"a guess: {args.dataset} is not on this machine yet; {netflix}"
        return Texts(7008, 779, 31.8, 4.4, 64, source)
    template = Template(args.template) if args.template else None
    examples, num_texts = sample_examples(path, args.text_column, template, 4 * SAMPLE_TEXTS)
    chosen = [each.whole for each in random.Random(0).sample(examples, min(SAMPLE_TEXTS, len(examples)))]
    tokenizer = _load_tokenizer(args.model_name_or_path)
    if tokenizer:
        lengths = [len(encoding.ids) + 2 for encoding in tokenizer.encode_batch(chosen, add_special_tokens=False)]
    else:
        lengths = [len(text) / CHARS_PER_TOKEN + 2 for text in chosen]
    lengths = [min(length, window) for length in lengths]
    mean = sum(lengths) / len(lengths)
    deviation = math.sqrt(sum((length - mean) ** 2 for length in lengths) / len(lengths))
    num_held_out = round(num_texts * min(max(args.validation_fraction, 0), 0.99))
    way = f"by its tokenizer from {len(chosen)} texts" if tokenizer else f"from the characters of {len(chosen)} texts"
    return Texts(
        max(num_texts - num_held_out, 1), num_held_out, mean, deviation, math.ceil(max(lengths)), f"estimated {way}"
    )


def _load_tokenizer(model_name_or_path: str):
    """The tokenizer of a model's folder, without transformers; None if there is none."""
    from tokenizers import ByteLevelBPETokenizer, Tokenizer

    folder = packaged_folder() if model_name_or_path == SMOLLM2 else Path(model_name_or_path)
    if (folder / "tokenizer.json").is_file():
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return ByteLevelBPETokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    return None
