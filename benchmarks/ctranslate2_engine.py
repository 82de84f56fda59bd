"""CTranslate2 in a process of its own. In PyTorch's process its threads leave PyTorch one of two cores."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

_loaded = {}  # in the engine's process


class CTranslate2Engine:
    """A CTranslate2 model with its tokenizer.

    Args:
        export: folder of `python -m neoflix.export --to gpt2`.
        folder: the export as CTranslate2's converter wrote it.
        compute_type: "float32" or "int8".
        threads: number of CPU cores.
    """

    def __init__(self, export: Path, folder: Path, compute_type: str, threads: int):
        self._process = ProcessPoolExecutor(
            1, get_context("spawn"), _load, (str(export), str(folder), compute_type, threads)
        )

    def write(self, num_tokens: int, num_texts: int, settings: dict) -> int:
        """Samples as docs/export.md shows, and returns the number of tokens."""
        return self._process.submit(_write, num_tokens, num_texts, settings).result()

    def close(self) -> None:
        self._process.shutdown()


def _load(export: str, folder: str, compute_type: str, threads: int) -> None:
    import ctranslate2
    from transformers import AutoTokenizer

    _loaded["tokenizer"] = AutoTokenizer.from_pretrained(export)
    _loaded["engine"] = ctranslate2.Generator(
        folder, "cpu", compute_type=compute_type, inter_threads=1, intra_threads=threads
    )


def _write(num_tokens: int, num_texts: int, settings: dict) -> int:
    engine, tokenizer = _loaded["engine"], _loaded["tokenizer"]
    results = engine.generate_batch(
        [[tokenizer.bos_token]] * num_texts,
        max_length=num_tokens,
        sampling_topk=settings["top_k"],
        sampling_topp=settings.get("top_p", 1.0),
        sampling_temperature=settings.get("temperature", 1.0),
        suppress_sequences=[[tokenizer.bos_token], [tokenizer.pad_token]],
        include_prompt_in_result=False,
    )
    ids = [result.sequences_ids[0] for result in results]
    tokenizer.batch_decode(ids)
    return sum(map(len, ids))
