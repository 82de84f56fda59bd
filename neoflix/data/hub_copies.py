"""Copies of the Hugging Face hub's data sets in the cache: Parquet files named by data set, split and revision."""

import hashlib
import re
from pathlib import Path


def hub_copy_file(name: str, fingerprint: str, cache_dir: Path) -> Path:
    """Where `hf:NAME[@CONFIG][:SPLIT]` is kept.

    Args:
        fingerprint: that of `datasets`, 16 hexadecimal digits, another one for each revision.
    """
    return cache_dir / f"{_prefix(name)}-{fingerprint}.parquet"


def find_hub_copy(name: str, cache_dir: Path) -> Path | None:
    """The newest copy of `hf:NAME[@CONFIG][:SPLIT]` in the cache; None if there is none. Asks no network."""
    copies = [path for path in cache_dir.glob("hf-*.parquet") if path.stem.rpartition("-")[0] == _prefix(name)]
    return max(copies, key=lambda path: path.stat().st_mtime_ns, default=None)


def _prefix(name: str) -> str:
    """Readable, and another one for each name: `a/b` and `a-b` differ in the digest alone."""
    whole = name if ":" in name.removeprefix("hf:") else f"{name}:train"
    digest = hashlib.sha256(whole.encode()).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9]+', '-', whole)[:80].strip('-')}-{digest}"
