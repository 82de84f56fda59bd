"""Data sets of the Hugging Face hub: downloaded once, and kept in the cache as Parquet files."""

import hashlib
import re
from pathlib import Path

from neoflix.runtime.cache import in_cache, new_path
from neoflix.runtime.errors import UserError

HUB_NAME = re.compile(r"hf:(?P<path>[^@:]+)(@(?P<config>[^:]+))?(:(?P<split>.+))?")


def download_from_hub(name: str, cache_dir: Path) -> Path:
    """Downloads 'hf:PATH[@CONFIG][:SPLIT]' once, and returns a Parquet file in `cache_dir`.

    The split is 'train' by default. PATH may also be a folder that `datasets` can load. Code of a
    data set is never run.

    Raises:
        UserError: if there is no such data set or split.
    """
    from datasets import load_dataset

    match = HUB_NAME.fullmatch(name)
    if match is None:
        raise UserError(f"--dataset {name}: must be hf:NAME, hf:NAME:SPLIT or hf:NAME@CONFIG:SPLIT")
    path, split = match["path"], match["split"] or "train"
    try:
        dataset = load_dataset(path, match["config"], split=split)
    except Exception as error:  # every data set's builder raises its own
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--dataset {name}: could not be loaded ({reason}); the name must be as on huggingface.co/datasets, "
            "followed by @CONFIG if the data set has several, and by :SPLIT for another split than train"
        ) from error
    file = hub_copy_file(name, dataset._fingerprint, cache_dir)
    if not file.is_file():
        with in_cache(cache_dir), new_path(file) as unfinished:
            dataset.to_parquet(unfinished)
    return file


def hub_copy_file(name: str, fingerprint: str, cache_dir: Path) -> Path:
    """Where the copy of 'hf:NAME[@CONFIG][:SPLIT]' is kept.

    Args:
        fingerprint: that of `datasets`, 16 hexadecimal digits; each revision has its own.
    """
    return cache_dir / f"{_prefix(name)}-{fingerprint}.parquet"


def find_hub_copy(name: str, cache_dir: Path) -> Path | None:
    """The newest copy of 'hf:NAME[@CONFIG][:SPLIT]' in the cache, or None. Does not use the network."""
    copies = [path for path in cache_dir.glob("hf-*.parquet") if path.stem.rpartition("-")[0] == _prefix(name)]
    return max(copies, key=lambda path: path.stat().st_mtime_ns, default=None)


def _prefix(name: str) -> str:
    """Readable and unique: the names of `a/b` and `a-b` differ in the digest alone."""
    whole = name if ":" in name.removeprefix("hf:") else f"{name}:train"
    digest = hashlib.sha256(whole.encode()).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9]+', '-', whole)[:80].strip('-')}-{digest}"
