"""Token counts of the texts: estimated, counted by a run, and found again."""

import json

import numpy as np
import pytest
from conftest import plan_flags, shape_of

from neoflix.arguments.reader import read_train_flags
from neoflix.data.packing import PaddedCollator, TokenBatches
from neoflix.data.sources import find_dataset
from neoflix.model.shape import read_shape
from neoflix.planning.lengths import CHARS_PER_TOKEN, Texts, count_texts, estimate_texts, remember_counts


def test_counts_are_estimated_then_remembered(train_words, catalogue, tmp_path):
    args = read_train_flags(train_words)
    shape = read_shape(args.model_name_or_path)
    guessed = count_texts(args, shape)
    assert guessed.source.startswith("estimated by its tokenizer")
    lengths = np.array([len(line) for line in ["x" * 20, "x" * 40]])
    remember_counts(args, shape.window, lengths, 1)
    counted = count_texts(args, shape)
    assert (counted.num_train, counted.mean, counted.longest, counted.source) == (
        *(2, 30.0, 40),
        "counted by an earlier run",
    )
    catalogue.write_text(catalogue.read_text() + "One more,A text that nobody counted.\n")
    assert count_texts(args, shape).source.startswith("estimated")


def test_data_sets_of_the_hub_are_found_in_the_cache(model_dir, tmp_path, titles):
    """A guess before the download; then a sample of the copy, and after a run its counts; each split by itself."""
    hub, cache = tmp_path / "hub", tmp_path / "cache"
    hub.mkdir()
    for split, texts in (("train", titles), ("test", titles[:7])):
        rows = [json.dumps({"text": text}) + "\n" for text in texts]
        (hub / f"{split}.jsonl").write_text("".join(rows), encoding="utf-8")

    def read(name: str):
        args = plan_flags("--dataset", name, "--cache_dir", str(cache), "--model_name_or_path", str(model_dir))
        return args, read_shape(str(model_dir))

    train, test = f"hf:{hub}", f"hf:{hub}:test"
    assert count_texts(*read(train)).source.startswith(f"a guess: {train} is not on this machine yet")
    copy = find_dataset(train, cache)
    assert count_texts(*read(test)).source.startswith("a guess"), "another split"
    find_dataset(test, cache)
    for name, num_texts in ((train, len(titles)), (f"{train}:train", len(titles)), (test, 7)):
        sampled = count_texts(*read(name))
        assert sampled.source.startswith("estimated by its tokenizer")
        assert sampled.num_train + sampled.num_validation == num_texts
    args, shape = read(train)
    remember_counts(args, shape.window, np.array([20, 40]), 1)
    assert count_texts(args, shape).source == "counted by an earlier run"
    assert count_texts(*read(test)).source.startswith("estimated")
    newer = copy.with_name(copy.name.replace(copy.stem[-16:], "0123456789abcdef"))
    newer.write_bytes(copy.read_bytes())
    assert count_texts(args, shape).source.startswith("estimated"), "another revision"


def test_counts_of_a_folder_are_those_of_its_files(tmp_path):
    """A folder's own time changes when files come and go, not when one is edited."""
    folder = tmp_path / "texts"
    (folder / "more").mkdir(parents=True)
    for number in range(3):
        (folder / "more" / f"{number}.txt").write_text(f"Text {number}.")
    args = plan_flags("--dataset", str(folder), "--cache_dir", str(tmp_path / "cache"))
    remember_counts(args, 2048, np.array([20, 40]), 1)
    assert count_texts(args, shape_of("125M")).source == "counted by an earlier run"
    (folder / "more" / "1.txt").write_text("Another text, and a longer one.")
    assert count_texts(args, shape_of("125M")).source.startswith("estimated")


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_estimate_reads_every_kind_of_file(suffix, tmp_path, titles):
    import pandas as pd

    path, table = tmp_path / f"texts{suffix}", pd.DataFrame({"description": titles * 60})
    if suffix == ".jsonl":
        table.to_json(path, orient="records", lines=True)
    elif suffix == ".parquet":
        table.to_parquet(path)
    else:
        table.to_csv(path, index=False, sep="\t" if suffix == ".tsv" else ",")
    found = estimate_texts(path, plan_flags(), 2048)
    assert found.num_train + found.num_validation == pytest.approx(len(table), rel=0.02)
    characters = sum(map(len, titles)) / len(titles)
    assert found.mean == pytest.approx(characters / CHARS_PER_TOKEN + 2, rel=0.1)


def test_estimate_reads_folders_and_templates(tmp_path, titles):
    for number, text in enumerate(titles[:100]):
        (tmp_path / f"{number}.txt").write_text(text)
    found = estimate_texts(tmp_path, plan_flags(), 2048)
    assert found.num_train + found.num_validation == 100
    prompted = estimate_texts(tmp_path, plan_flags("--template", "{name} is a long word: {text}"), 2048)
    assert prompted.mean > found.mean + 3


@pytest.fixture(scope="module")
def lengths_N():  # noqa: N802
    return np.random.default_rng(0).normal(32, 5, 7000).clip(8, 64).round().astype(np.int64)


def measure(batches, lengths_N) -> tuple[int, float]:
    """(most tokens that one of the batches computes, tokens computed for each real one), by the collator."""
    sizes = []
    for batch in batches:
        rows = [{"input_ids": [1] * lengths_N[i], "prompt_length": 1} for i in batch]
        sizes.append(PaddedCollator(0)(rows)["input_ids"].numel())
    return max(sizes), sum(sizes) / lengths_N.sum()


def texts_of(lengths_N) -> Texts:
    return Texts(len(lengths_N), 0, lengths_N.mean(), lengths_N.std(), int(lengths_N.max()), "given")


@pytest.mark.parametrize("num_texts", [1, 4, 16, 64])
def test_padding_of_a_count_of_texts(num_texts, lengths_N):
    shuffled = np.random.default_rng(1).permutation(len(lengths_N))
    batches = [shuffled[start : start + num_texts] for start in range(0, len(shuffled), num_texts)]
    most, padding = measure(batches, lengths_N)
    texts = texts_of(lengths_N)
    assert texts.of_batch(num_texts, packed=False) == most
    assert texts.padding(num_texts, None, packed=False) == pytest.approx(padding, rel=0.03)
    assert texts.padding(num_texts, None, packed=True) == 1


@pytest.mark.parametrize("budget", [256, 640, 2048])
def test_padding_of_a_budget_of_tokens(budget, lengths_N):
    """The budget holds real tokens; padded to the longest text of each batch they are more."""
    most, padding = measure(TokenBatches(lengths_N, budget, 1, 0, 1, 0), lengths_N)
    texts = texts_of(lengths_N)
    assert texts.of_budget(budget, packed=False) == pytest.approx(most, rel=0.1)
    assert texts.of_budget(budget, packed=True) == budget
    assert texts.padding(None, budget, packed=False) == pytest.approx(padding, rel=0.1)
