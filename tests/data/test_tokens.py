import hashlib
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from conftest import as_examples, gpt2_tokenizer_dir, netflix_csv

from neoflix.data.packing import IGNORE_INDEX, PackedCollator, PaddedCollator
from neoflix.data.sources import read_examples
from neoflix.data.split import TextSplit
from neoflix.data.template import Example, Template
from neoflix.data.tokenizer import load_tokenizer
from neoflix.data.tokens import (
    FEWEST_TOKENS,
    count_tokens,
    fill_up,
    name_tokens,
    tokenize_split,
    tokenize_texts,
    write_tokens,
)
from neoflix.runtime.errors import UserError

TEMPLATE = Template("{type} | {listed_in} | {title}: {description}")
ROW = {"type": "Movie", "listed_in": "Crime | Drama", "title": "Alien: Again", "description": "It is: back | again."}


def test_texts_come_back_between_their_control_tokens(tokens, titles, tokenizer):
    for ids, num_chars, text in zip(tokens["input_ids"], tokens["num_chars"], titles, strict=False):
        assert ids[0] == tokenizer.bos_token_id
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids[1:-1]) == text
        assert num_chars == len(text)


def test_control_tokens_inside_a_text_are_text(tokenizer, tmp_path):
    text = "one <|endoftext|> two <|startoftext|> <|pad|>"
    dataset = tokenize_texts(as_examples([text]), tokenizer, 256, tmp_path).dataset
    ids = dataset[0]["input_ids"]
    assert not {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id} & set(ids[1:-1])
    assert tokenizer.decode(ids[1:-1]) == text


def test_long_texts_are_cut_before_their_end_and_counted(tokenizer, tmp_path, capsys):
    examples = as_examples(["word " * 300, "short", "é" * 300])
    dataset, num_tokens, num_cut, *_ = tokenize_texts(examples, tokenizer, 10, tmp_path)
    assert num_cut == 2
    assert [len(ids) for ids in dataset["input_ids"]][::2] == [10, 10]
    assert num_tokens == sum(len(ids) for ids in dataset["input_ids"])
    for ids, num_chars in zip(dataset["input_ids"], dataset["num_chars"], strict=True):
        assert ids[-1] == tokenizer.eos_token_id
        assert len(tokenizer.decode(ids[1:-1])) == num_chars
    tokenize_split(TextSplit(examples, as_examples(["more"])), tokenizer, 10, tmp_path)
    assert "2 texts longer than 10 tokens were cut" in capsys.readouterr().out


def test_cache_is_one_file_for_one_content(titles, tokenizer, model_dir, tmp_path):
    def files(texts=titles, of=tokenizer, max_length=100):
        tokenize_texts(as_examples(texts), of, max_length, tmp_path)
        return {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}

    first = files()
    assert len(first) == 2
    assert files() == first, "the same content was tokenised twice"
    other = load_tokenizer(str(model_dir))
    other.add_tokens(["gentle"])
    for change in ({"texts": titles[1:]}, {"max_length": 99}, {"of": other}):
        before = len(list(tmp_path.iterdir()))
        assert len(files(**change)) == before + 2


def test_a_second_writer_does_not_disturb_the_first(titles, tokenizer, tmp_path, monkeypatch):
    """Nodes that share a cache write the same file at once: what one has read must never be half of another's."""
    examples = as_examples(titles)
    first = tokenize_texts(examples, tokenizer, 100, tmp_path)

    def half(path, text):
        path.write_bytes(text[: len(text) // 2].encode())
        raise OSError("killed here")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="killed here"):
        write_tokens(examples, tokenizer, 100, next(tmp_path.glob("*.arrow")))
    assert tokenize_texts(examples, tokenizer, 100, tmp_path)[1:] == first[1:]


def test_tokens_stay_on_disk(tokenizer, tmp_path):
    examples = as_examples([f"Text number {i} of many, of some length, and nothing more." for i in range(20_000)])
    before = pa.total_allocated_bytes()
    dataset, num_tokens, *_ = tokenize_texts(examples, tokenizer, 256, tmp_path)
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
    examples = read_examples(netflix_csv(), "description")
    assert len(examples) == 7787
    tokenizer = load_tokenizer(str(folder))
    assert len(tokenizer) == 50_259
    _, num_tokens, num_cut, *_ = tokenize_texts(examples, tokenizer, 2048, tmp_path)
    assert (num_tokens, num_cut) == (247_373, 0)


def test_prompt_and_completion_are_tokenized_separately(tokenizer, tmp_path):
    ids = tokenize_texts([TEMPLATE.fill(ROW)], tokenizer, 64, tmp_path).dataset[0]["input_ids"]
    prompt, completion, _ = TEMPLATE.fill(ROW)
    assert ids[1:-1] == tokenizer(prompt)["input_ids"] + tokenizer(completion)["input_ids"]


@pytest.mark.parametrize("loss_on_prompt", [False, True])
def test_prompts_are_targets_only_with_loss_on_prompt(tokenizer, tmp_path, loss_on_prompt):
    hostile = {"type": "<|endoftext|>", "listed_in": "", "title": "x", "description": "Short."}
    examples = [TEMPLATE.fill(row) for row in (ROW, hostile)]
    tokens, num_tokens, num_cut, *_ = tokenize_texts(examples, tokenizer, 64, tmp_path, loss_on_prompt)
    assert num_cut == 0
    assert num_tokens == sum(map(len, tokens["input_ids"]))
    for ids, num_chars, example in zip(tokens["input_ids"], tokens["num_chars"], examples, strict=True):
        assert tokenizer.decode(ids[1:-1]) == example.whole
        assert tokenizer.eos_token_id not in ids[:-1], "a control token in a field is text"
        assert num_chars == len(example.whole if loss_on_prompt else example.completion.strip())
    packed, padded = PackedCollator()(list(tokens)), PaddedCollator(tokenizer.pad_token_id)(list(tokens))
    for labels in (
        packed["labels"][packed["labels"] != IGNORE_INDEX],
        padded["labels"][padded["labels"] != IGNORE_INDEX],
    ):
        targets = [example.whole if loss_on_prompt else example.completion for example in examples]
        assert tokenizer.decode(labels) == "".join(text + tokenizer.eos_token for text in targets)


@pytest.mark.parametrize("loss_on_prompt", [False, True])
def test_long_prompts_and_texts_are_cut(tokenizer, tmp_path, loss_on_prompt):
    example = Template("{title}: {text}").fill({"title": "A title", "text": "Many words follow it here."})
    whole = tokenize_texts([example], tokenizer, 64, tmp_path, loss_on_prompt).dataset[0]
    for max_length in range(3, len(whole["input_ids"]) + 1):
        outcome = tokenize_texts([example], tokenizer, max_length, tmp_path, loss_on_prompt)
        tokens = outcome.dataset
        if outcome.num_left_out:
            assert max_length < whole["prompt_length"] + 1 + FEWEST_TOKENS or loss_on_prompt
            assert len(tokens) == 0
            continue
        ids = tokens[0]["input_ids"]
        assert outcome.num_cut == (max_length < len(whole["input_ids"]))
        assert len(ids) == max_length
        assert ids[-1] == tokenizer.eos_token_id
        assert tokens[0]["prompt_length"] == (1 if loss_on_prompt else min(whole["prompt_length"], max_length - 1))
        kept = tokenizer.decode(ids[1 if loss_on_prompt else tokens[0]["prompt_length"] : -1])
        assert tokens[0]["num_chars"] == len(kept if loss_on_prompt else kept.strip())


def test_the_name_of_tokens_is_that_of_earlier_versions(tokenizer):
    """A run's record has it as the identity of its data: if it changes, no earlier run can be resumed."""
    backend = tokenizer.backend_tokenizer.to_str().encode()
    special = f"{tokenizer.bos_token_id} {tokenizer.eos_token_id}"
    for examples, facts in (
        (as_examples(["One.", "Two."]), f"2 64 {special} False".encode() + backend + b"\0One.\0\0Two.\0"),
        ([Example("A:", " One.")], f"3 64 {special} False".encode() + backend + b"A:\0 One.\0"),
    ):
        assert name_tokens(examples, tokenizer, 64) == f"tokens-{hashlib.sha256(facts).hexdigest()[:24]}"


def test_cache_files_of_other_columns_are_not_read(tokenizer, tmp_path):
    """Earlier versions wrote other columns to `{name}.arrow`."""
    examples = as_examples(["One.", "Two."])
    tokens = tokenize_texts(examples, tokenizer, 64, tmp_path)
    (tmp_path / f"{tokens.name}.arrow").write_bytes(b"of another version")
    assert tokenize_texts(examples, tokenizer, 64, tmp_path).dataset[:] == tokens.dataset[:]


def crowded(num_long: int, titles) -> list[Example]:
    template = Template("{title}: {text}")
    rows = [
        {"title": "A" if i >= num_long else "A long title " * 9, "text": text} for i, text in enumerate(titles[:40])
    ]
    return [template.fill(row) for row in rows]


def test_texts_without_room_behind_their_prompt_are_left_out_and_counted(titles, tokenizer, tmp_path, capsys):
    examples = crowded(3, titles)
    train = tokenize_split(TextSplit(examples, as_examples(titles[40:50])), tokenizer, 30, tmp_path).train.dataset
    assert len(train) == 37
    assert "37 texts" in (output := capsys.readouterr().out)
    assert "3 were left out" in output
    assert min(len(ids) - given - 1 for ids, given in zip(train["input_ids"], train["prompt_length"], strict=True)) >= 8
    assert tokenize_texts(examples, tokenizer, 30, tmp_path).num_left_out == 3, "known to whoever reads the cache, too"


@pytest.mark.parametrize("sides", [(30, 0), (0, 10)])
def test_too_many_texts_without_room_are_refused(titles, tokenizer, tmp_path, sides):
    split = TextSplit(crowded(sides[0], titles), crowded(40, titles)[: sides[1]])
    with pytest.raises(UserError, match=r"--max_length 30: .*(30 of 40|10 of 50) texts .* \d+ or more"):
        tokenize_split(split, tokenizer, 30, tmp_path)


def test_control_tokens_named_in_texts_are_told(titles, tokenizer, tmp_path, capsys):
    examples = as_examples([f"{text}<|endoftext|>" for text in titles[:5]] + titles[5:9])
    train = tokenize_split(TextSplit(examples[:-1], examples[-1:]), tokenizer, 64, tmp_path).train.dataset
    assert "warning: 5 of 9 texts contain '<|endoftext|>'" in capsys.readouterr().out
    assert all(ids.count(tokenizer.eos_token_id) == 1 for ids in train["input_ids"])
    tokenize_split(TextSplit(examples[5:8], examples[8:]), tokenizer, 64, tmp_path)
    assert "warning" not in capsys.readouterr().out


def test_filled_up_texts_have_no_target(tokens, tokenizer):
    filled = fill_up(tokens, 16, tokenizer.bos_token_id)
    assert len(filled) == 48
    assert filled[40:]["input_ids"] == [[tokenizer.bos_token_id]] * 8
    assert filled[40:]["prompt_length"] == [1] * 8
    assert fill_up(tokens, 8, tokenizer.bos_token_id) is tokens


def test_tokens_are_counted(tokens, tokenizer):
    filled = fill_up(tokens, 16, tokenizer.bos_token_id)
    assert count_tokens(filled).tolist() == [len(row) for row in filled["input_ids"]]
