"""Reading, splitting, tokenising and collating; and that packing changes nothing a model learns."""

import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import gpt2_tokenizer_dir, netflix_csv

from neoflix.data.packing import IGNORE_INDEX, PackedCollator, PaddedCollator, TokenBatches
from neoflix.data.sources import read_texts
from neoflix.data.split import TextSplit, split_texts
from neoflix.data.template import Template
from neoflix.data.tokenizer import load_tokenizer
from neoflix.data.tokens import _write_tokens, count_tokens, fill_up, tokenize_split, tokenize_texts
from neoflix.model.load import load_model
from neoflix.runtime.errors import UserError


@pytest.fixture(scope="module")
def tokenizer(model_dir):
    return load_tokenizer(str(model_dir))


@pytest.fixture
def tokens(titles, tokenizer, tmp_path):
    return tokenize_texts(titles[:40], tokenizer, 256, tmp_path)[0]


# ---- split ----------------------------------------------------------------------------------------------


def normalised(texts):
    return {"".join(c for c in text.casefold() if c.isalnum()) for text in texts}


def test_no_text_and_no_twin_on_both_sides(titles):
    twins = [text.upper().replace(",", " ,") for text in titles[::3]]
    split = split_texts(titles + twins + titles[::5], 0.3)
    assert not normalised(split.train) & normalised(split.validation)
    assert len(split.train) + len(split.validation) == len(titles) + len(twins) + len(titles[::5])


def test_split_is_unmoved_by_order_and_seed(titles):
    before = split_texts(titles, 0.1)
    shuffled = titles[:]
    for seed in (1, 2):
        random.seed(seed)
        torch.manual_seed(seed)
        random.shuffle(shuffled)
        after = split_texts(shuffled, 0.1)
        assert sorted(after.validation) == sorted(before.validation)
    assert split_texts(titles, 0.1).train == [text for text in titles if text not in set(before.validation)]


def test_split_shares_and_grows(titles):
    sizes = [len(split_texts(titles, fraction).validation) for fraction in (0.05, 0.1, 0.5)]
    assert 0.02 < sizes[0] / len(titles) < 0.1
    assert 0.4 < sizes[2] / len(titles) < 0.6
    assert set(split_texts(titles, 0.1).validation) <= set(split_texts(titles, 0.5).validation)
    assert split_texts(titles, 0) == TextSplit(titles, [])


@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.999])
def test_both_sides_get_a_text(fraction):
    split = split_texts(["one", "two", "one"], fraction)
    assert sorted(map(len, split)) == [1, 2]
    assert not set(split.train) & set(split.validation)


def test_one_distinct_text_is_refused():
    with pytest.raises(ValueError, match="all texts are the same"):
        split_texts(["Same text.", "same  text"], 0.1)


# ---- tokenise -------------------------------------------------------------------------------------------


def test_texts_come_back_between_their_control_tokens(tokens, titles, tokenizer):
    for ids, num_chars, text in zip(tokens["input_ids"], tokens["num_chars"], titles, strict=False):
        assert ids[0] == tokenizer.bos_token_id
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids[1:-1]) == text
        assert num_chars == len(text)


def test_control_tokens_inside_a_text_are_text(tokenizer, tmp_path):
    text = "one <|endoftext|> two <|startoftext|> <|pad|>"
    dataset, *_ = tokenize_texts([text], tokenizer, 256, tmp_path)
    ids = dataset[0]["input_ids"]
    assert not {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id} & set(ids[1:-1])
    assert tokenizer.decode(ids[1:-1]) == text


def test_long_texts_are_cut_before_their_end_and_counted(tokenizer, tmp_path, capsys):
    texts = ["word " * 300, "short", "é" * 300]
    dataset, num_tokens, num_cut, *_ = tokenize_texts(texts, tokenizer, 10, tmp_path)
    assert num_cut == 2
    assert [len(ids) for ids in dataset["input_ids"]][::2] == [10, 10]
    assert num_tokens == sum(len(ids) for ids in dataset["input_ids"])
    for ids, num_chars in zip(dataset["input_ids"], dataset["num_chars"], strict=True):
        assert ids[-1] == tokenizer.eos_token_id
        assert len(tokenizer.decode(ids[1:-1])) == num_chars
    tokenize_split(TextSplit(texts, ["more"]), tokenizer, 10, tmp_path)
    assert "2 texts longer than 10 tokens were cut" in capsys.readouterr().out


def test_cache_is_one_file_for_one_content(titles, tokenizer, model_dir, tmp_path):
    def files(texts=titles, of=tokenizer, max_length=100):
        tokenize_texts(texts, of, max_length, tmp_path)
        return {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}

    first = files()
    assert len(first) == 2
    assert files() == first, "the same content was tokenised twice"
    other = load_tokenizer(str(model_dir))
    other.add_tokens(["gentle"])
    for change in ({"texts": titles[1:]}, {"max_length": 99}, {"of": other}):
        before = len(list(tmp_path.iterdir()))
        assert len(files(**change)) == before + 2


def test_whoever_comes_second_takes_nothing_from_the_first(titles, tokenizer, tmp_path, monkeypatch):
    """Nodes that share a cache write the same file at once: what one has read must never be half of another's."""
    first = tokenize_texts(titles, tokenizer, 100, tmp_path)

    def half(path, text):
        path.write_bytes(text[: len(text) // 2].encode())
        raise OSError("killed here")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="killed here"):
        _write_tokens(titles, tokenizer, 100, next(tmp_path.glob("*.arrow")))
    assert tokenize_texts(titles, tokenizer, 100, tmp_path)[1:] == first[1:]


def test_tokens_stay_on_disk(tokenizer, tmp_path):
    texts = [f"Text number {i} of many, of some length, and nothing more." for i in range(20_000)]
    before = pa.total_allocated_bytes()
    dataset, num_tokens, *_ = tokenize_texts(texts, tokenizer, 256, tmp_path)
    filled = fill_up(dataset, 64, tokenizer.bos_token_id)
    assert filled[12_345]["input_ids"] == dataset[12_345]["input_ids"]
    assert num_tokens * 4 > 1_000_000
    assert pa.total_allocated_bytes() - before < num_tokens * 4 / 10
    assert [Path(file["filename"]).parent for file in dataset.cache_files] == [tmp_path]


def test_real_catalogue_has_247373_tokens(tmp_path):
    """The figure of the real catalogue of January 2021 with the real GPT-2 vocabulary."""
    if netflix_csv() is None or gpt2_tokenizer_dir() is None:
        pytest.skip("needs NETFLIX_TITLES_CSV and GPT2_TOKENIZER_DIR")
    folder = tmp_path / "gpt2"
    shutil.copytree(gpt2_tokenizer_dir(), folder, copy_function=shutil.copyfile)
    (folder / "config.json").write_text('{"model_type": "gpt_neo"}')
    texts = read_texts(netflix_csv(), "description")
    assert len(texts) == 7787
    tokenizer = load_tokenizer(str(folder))
    assert len(tokenizer) == 50_259
    _, num_tokens, num_cut, *_ = tokenize_texts(texts, tokenizer, 2048, tmp_path)
    assert (num_tokens, num_cut) == (247_373, 0)


# ---- batch ----------------------------------------------------------------------------------------------


def batches_of(lengths, budget, batches_per_step=1, world_size=1, epoch=0, seed=1):
    """What each process gets: a list of batches for each rank."""
    ranks = []
    for rank in range(world_size):
        sampler = TokenBatches(np.array(lengths), budget, batches_per_step, rank, world_size, seed)
        sampler.set_epoch(epoch)
        ranks.append(list(sampler))
        assert len(ranks[-1]) == len(sampler)
    return ranks


@pytest.mark.parametrize("budget", [64, 100, 1000, 5000])
def test_token_batches_are_whole_even_and_within_the_budget(budget):
    lengths = np.random.default_rng(0).integers(14, 65, 1003)
    (batches,) = batches_of(lengths, budget, batches_per_step=4)
    assert sorted(text for batch in batches for text in batch) == list(range(1003))
    sums = [lengths[batch].sum() for batch in batches]
    assert max(sums) <= budget
    assert len(batches) % 4 == 0
    assert all(batches)
    if budget >= 1000:  # nearly full, and alike
        assert max(sums) - min(sums) <= 64
        assert sum(sums) > 0.85 * budget * len(batches)


def test_token_batches_of_texts_of_very_different_lengths():
    lengths = np.concatenate([np.full(3, 2048), np.full(500, 20), np.full(40, 300)])
    (batches,) = batches_of(lengths, 2048)
    assert max(lengths[batch].sum() for batch in batches) <= 2048
    assert len(batches) <= 1.1 * lengths.sum() / 2048, "a text as long as the budget leaves the other batches full"


def test_each_epoch_draws_other_batches_and_the_same_again():
    lengths = np.random.default_rng(0).integers(14, 65, 200)
    first, second = (batches_of(lengths, 500, epoch=epoch) for epoch in (0, 1))
    assert first != second
    assert first == batches_of(lengths, 500, epoch=0)
    assert first != batches_of(lengths, 500, seed=2)
    assert len(first[0]) == len(second[0]), "Trainer counts steps once"


def test_processes_and_accumulation_see_the_same_texts_in_a_step():
    lengths = np.random.default_rng(0).integers(14, 65, 333)
    (alone,) = batches_of(lengths, 300, batches_per_step=6)
    two = batches_of(lengths, 300, batches_per_step=6, world_size=2)
    assert [batch for pair in zip(*two, strict=True) for batch in pair] == alone


def test_text_longer_than_the_budget_is_refused():
    with pytest.raises(ValueError, match=r"the longest text has 64 tokens.*--max_length 60"):
        batches_of([10, 64], 60)


def test_tokens_are_counted(tokens, tokenizer):
    filled = fill_up(tokens, 16, tokenizer.bos_token_id)
    assert count_tokens(filled).tolist() == [len(row) for row in filled["input_ids"]]


# ---- collate --------------------------------------------------------------------------------------------


def test_end_is_learnt_and_padding_is_not(tokens, tokenizer):
    examples = [tokens[i] for i in range(5)]
    packed, padded = PackedCollator()(examples), PaddedCollator(tokenizer.pad_token_id)(examples)
    num_labels = sum(len(example["input_ids"]) - 1 for example in examples)
    for batch in (packed, padded):
        learnt = batch["labels"][:, 1:]
        assert (learnt == tokenizer.eos_token_id).sum() == len(examples)
        assert (learnt != IGNORE_INDEX).sum() == num_labels
        assert not torch.isin(learnt, torch.tensor([tokenizer.pad_token_id, tokenizer.bos_token_id])).any()
    assert packed["input_ids"].shape == (1, num_labels + len(examples))
    assert (padded["input_ids"][padded["attention_mask"] == 0] == tokenizer.pad_token_id).all()


def test_filled_up_texts_count_nothing(tokens, tokenizer):
    filled = fill_up(tokens, 16, tokenizer.bos_token_id)
    assert len(filled) == 48
    batch = PackedCollator()([filled[i] for i in range(40, 48)])
    assert (batch["labels"] == IGNORE_INDEX).all()
    assert fill_up(tokens, 8, tokenizer.bos_token_id) is tokens


def loss_and_gradients(model, batches) -> tuple[float, dict[str, torch.Tensor]]:
    """Sum over batches of the summed loss, so that it does not matter how texts are laid into batches."""
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = model(**batch, num_items_in_batch=1).loss
        loss.backward()
        total += loss.item()
    return total, {name: weight.grad.clone() for name, weight in model.named_parameters()}


def test_packed_equals_one_by_one_equals_padded(tokens, tokenizer, model_dir):
    model = load_model(str(model_dir), tokenizer, torch.float32, {})
    examples = [tokens[i] for i in range(12)]
    assert max(len(e["input_ids"]) for e in examples) > model.config.window_size
    plain = [{"input_ids": torch.tensor([e["input_ids"]])} for e in examples]
    one_by_one = loss_and_gradients(model, [batch | {"labels": batch["input_ids"]} for batch in plain])
    packed = loss_and_gradients(model, [PackedCollator()(examples)])
    padded = loss_and_gradients(model, [PaddedCollator(tokenizer.pad_token_id)(examples)])
    for other in (packed, padded):
        assert other[0] == pytest.approx(one_by_one[0], rel=1e-5)
        for name, gradient in one_by_one[1].items():
            scale = gradient.abs().max().clamp(min=1.0)
            torch.testing.assert_close(other[1][name] / scale, gradient / scale, atol=1e-5, rtol=1e-4)


# ---- prompts that leave no room, control tokens in texts -----------------------------------------------------


def crowded(num_long: int, titles) -> list[str]:
    template = Template("{title}: {text}")
    rows = [
        {"title": "A" if i >= num_long else "A long title " * 9, "text": text} for i, text in enumerate(titles[:40])
    ]
    return [template.fill(row) for row in rows]


def test_texts_without_room_behind_their_prompt_are_left_out_and_counted(titles, tokenizer, tmp_path, capsys):
    texts = crowded(3, titles)
    train, _ = tokenize_split(TextSplit(texts, titles[40:50]), tokenizer, 30, tmp_path)
    assert len(train) == 37
    assert "37 texts" in (said := capsys.readouterr().out)
    assert "3 were left out: their prompts fill 30 tokens" in said
    assert min(len(ids) - given - 1 for ids, given in zip(train["input_ids"], train["prompt_length"], strict=True)) >= 8
    assert tokenize_texts(texts, tokenizer, 30, tmp_path).num_crowded == 3, "known to whoever reads the cache, too"


@pytest.mark.parametrize("sides", [(30, 0), (0, 10)])
def test_too_many_texts_without_room_are_refused(titles, tokenizer, tmp_path, sides):
    split = TextSplit(crowded(sides[0], titles), crowded(40, titles)[: sides[1]])
    with pytest.raises(
        UserError, match=r"--max_length 30: the prompts of (30 of 40|10 of 50) texts .* use \d+ or more"
    ):
        tokenize_split(split, tokenizer, 30, tmp_path)


def test_control_tokens_named_in_texts_are_told(titles, tokenizer, tmp_path, capsys):
    texts = [f"{text}<|endoftext|>" for text in titles[:5]] + titles[5:8]
    train, _ = tokenize_split(TextSplit(texts, titles[8:9]), tokenizer, 64, tmp_path)
    assert "warning: 5 of 9 texts hold '<|endoftext|>', which is read as plain text" in capsys.readouterr().out
    assert all(ids.count(tokenizer.eos_token_id) == 1 for ids in train["input_ids"])
    tokenize_split(TextSplit(titles[:5], titles[8:9]), tokenizer, 64, tmp_path)
    assert "warning" not in capsys.readouterr().out
