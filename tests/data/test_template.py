"""Templates: fields in front of a text, where they end, what is learnt, and what is written for them."""

import json
import random
import re

import pandas as pd
import pytest
import torch
from conftest import ROOT

import generate
import train
from neoflix.arguments.generate import parse_generate_args
from neoflix.data.packing import IGNORE_INDEX, PackedCollator, PaddedCollator
from neoflix.data.sources import read_texts
from neoflix.data.split import split_texts
from neoflix.data.template import Template, attach_template, find_template, parts
from neoflix.data.tokenizer import load_tokenizer
from neoflix.data.tokens import FEWEST_TOKENS, tokenize_texts
from neoflix.judging.judge import read_training_texts
from neoflix.sampling.sampler import Sampler

PATTERN = "{type} | {listed_in} | {title}: {description}"
ROW = {"type": "Movie", "listed_in": "Crime | Drama", "title": "Alien: Again", "description": "It is: back | again."}


@pytest.fixture(scope="module")
def tokenizer(model_dir):
    return load_tokenizer(str(model_dir))


# ---- the pattern ----------------------------------------------------------------------------------------


def test_prompt_and_text():
    template = Template(PATTERN)
    assert (template.fields, template.text_field) == (["type", "listed_in", "title"], "description")
    prompt, text = parts(template.fill(ROW))
    assert prompt == r"Movie | Crime \| Drama | Alien\: Again:"
    assert text == " It is: back | again."
    assert template.prompt({}) == " |  | :"
    assert template.prompt(ROW, until="title") == r"Movie | Crime \| Drama |"
    assert parts("A text without a prompt.") == ("", "A text without a prompt.")


@pytest.mark.parametrize("pattern", [PATTERN, "{a}||{b}->{c}", "{a} by {b}\n{c}", "Title: {a}\nMood: {b}\nPlot: {c}"])
def test_fields_are_read_as_they_were_written(pattern):
    template, rng = Template(pattern), random.Random(0)
    for _ in range(2000):
        values = ["".join(rng.choices("|-> \\by:\nxMood", k=rng.randint(0, 7))) for _ in template.fields]
        text = template.fill(dict(zip(template.fields, values, strict=True)) | {template.text_field: "T"})
        assert template.read(text) == [" ".join(value.split()) for value in values], repr(text)


BAD_PATTERNS = {
    "{description}": "two columns or more",
    "no column": "two columns or more",
    "{}: {description}": "two columns or more",
    "{a} {b}": "there must be a separator",
    "{a}{b}": "there must be a separator",
    "{a}: {b}.": r"'\.' follows it",
    "{a:>3}: {b}": "nothing else",
    "{a!r}: {b}": "nothing else",
    "{a}: {a}": "twice",
    "{a: {b}": "--template",
    "{a}: {b}}": "written twice",
}


@pytest.mark.parametrize("pattern", BAD_PATTERNS)
def test_bad_patterns_are_told_in_one_sentence(pattern):
    with pytest.raises(ValueError, match=BAD_PATTERNS[pattern]) as error:
        Template(pattern)
    assert "\n" not in str(error.value)


def test_left_out_fields_are_drawn_from_rows_that_fit():
    rows = [["Movie", "Crime", "A"], ["Movie", "Comedy", "B"], ["TV Show", "Crime", "C"], ["TV Show", "Crime", "D"]]
    template = Template(PATTERN, rows=rows)
    drawn = [template.draw({"type": "TV Show", "listed_in": "Crime"}, 1, index)["title"] for index in range(40)]
    assert set(drawn) == {"C", "D"}
    assert template.draw({"title": "New", "listed_in": "Comedy"}, 1, 5) == {
        "type": "Movie",
        "listed_in": "Comedy",
        "title": "New",
    }
    assert template.draw({}, 1, 5) == template.draw({}, 1, 5)
    assert len({template.draw({}, 1, index)["title"] for index in range(40)}) == 4


def test_tokenizer_carries_the_template(tokenizer, model_dir, tmp_path):
    template = Template(PATTERN).with_rows([Template(PATTERN).fill(ROW)])
    assert template.rows == [["Movie", "Crime | Drama", "Alien: Again"]]
    other = load_tokenizer(str(model_dir))
    attach_template(other, template)
    other.save_pretrained(tmp_path)
    assert find_template(load_tokenizer(str(tmp_path))) == template
    assert find_template(tokenizer) is None
    assert Template(PATTERN, learns_prompt=True).with_rows([Template(PATTERN).fill(ROW)]).rows == []


# ---- what is learnt -------------------------------------------------------------------------------------


@pytest.mark.parametrize("learn_prompt", [False, True])
def test_loss_is_on_the_text_alone_unless_prompts_are_learnt(tokenizer, tmp_path, learn_prompt):
    hostile = {"type": "<|endoftext|>", "listed_in": "", "title": "x", "description": "Short."}
    texts = [Template(PATTERN).fill(row) for row in (ROW, hostile)]
    tokens, num_tokens, num_cut, *_ = tokenize_texts(texts, tokenizer, 64, tmp_path, learn_prompt)
    assert num_cut == 0
    assert num_tokens == sum(map(len, tokens["input_ids"]))
    for ids, num_chars, text in zip(tokens["input_ids"], tokens["num_chars"], texts, strict=True):
        assert tokenizer.decode(ids[1:-1]) == text
        assert tokenizer.eos_token_id not in ids[:-1], "a control token in a field is text"
        assert num_chars == len(text if learn_prompt else parts(text)[1].strip())
    packed, padded = PackedCollator()(list(tokens)), PaddedCollator(tokenizer.pad_token_id)(list(tokens))
    for labels in (
        packed["labels"][packed["labels"] != IGNORE_INDEX],
        padded["labels"][padded["labels"] != IGNORE_INDEX],
    ):
        learnt = [text if learn_prompt else parts(text)[1] for text in texts]
        assert tokenizer.decode(labels) == "".join(text + tokenizer.eos_token for text in learnt)


@pytest.mark.parametrize("learn_prompt", [False, True])
def test_long_prompts_and_texts_are_cut(tokenizer, tmp_path, learn_prompt):
    text = Template("{title}: {description}").fill({"title": "A title", "description": "Many words follow it here."})
    whole = tokenize_texts([text], tokenizer, 64, tmp_path, learn_prompt)[0][0]
    for max_length in range(3, len(whole["input_ids"]) + 1):
        tokens, _, num_cut, num_crowded, _ = tokenize_texts([text], tokenizer, max_length, tmp_path, learn_prompt)
        if num_crowded:
            assert max_length < whole["prompt_length"] + 1 + FEWEST_TOKENS or learn_prompt
            assert len(tokens) == 0
            continue
        ids = tokens[0]["input_ids"]
        assert num_cut == (max_length < len(whole["input_ids"]))
        assert len(ids) == max_length
        assert ids[-1] == tokenizer.eos_token_id
        assert tokens[0]["prompt_length"] == (1 if learn_prompt else min(whole["prompt_length"], max_length - 1))
        kept = tokenizer.decode(ids[1 if learn_prompt else tokens[0]["prompt_length"] : -1])
        assert tokens[0]["num_chars"] == len(kept if learn_prompt else kept.strip())


def test_prompts_do_not_move_the_split(titles):
    texts = [Template("{title}: {description}").fill({"title": str(i), "description": t}) for i, t in enumerate(titles)]
    split = split_texts(texts, 0.2)
    assert [parts(text)[1].strip() for text in split.validation] == split_texts(titles, 0.2).validation


# ---- a model that was told the genre --------------------------------------------------------------------

WORDS = {"Sea": ["ship", "harbour", "sailor", "storm"], "Kitchen": ["cook", "soup", "kettle", "recipe"]}


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory):
    """200 texts, half of them with words of the sea, half of the kitchen."""
    rng, rows = random.Random(1), []
    for number in range(200):
        genre = ("Sea", "Kitchen")[number % 2]
        one, other, third = rng.sample(WORDS[genre], 3)
        text = f"A {one} and a {other} meet the old {third} in year {number}."
        rows.append({"genre": genre, "name": f"Number {number}", "plot": text})
    path = tmp_path_factory.mktemp("catalogue") / "genres.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


@pytest.fixture(scope="module", params=["text", "prompt and text"])
def told(request, catalogue, model_dir):
    """A run that was told genres; what it learnt: the text alone, or genre and name as well."""
    folder = catalogue.parent / request.param
    train.main(
        [
            *("--model_name_or_path", str(model_dir), "--dataset", str(catalogue), "--output_dir", str(folder)),
            *("--template", "{genre} | {name}: {plot}", "--cache_dir", str(folder / "cache")),
            *("--loss_on_prompt", str(request.param == "prompt and text")),
            *("--deepspeed", str(ROOT / "ds_configs" / "cpu.json"), "--per_device_train_batch_size", "16"),
            *("--learning_rate", "1e-2", "--max_steps", "120", "--save_strategy", "no", "--eval_strategy", "steps"),
            *("--eval_steps", "120", "--metric_for_best_model", "eval_loss", "--early_stopping_patience", "0"),
            *("--report_to", "none", "--disable_tqdm", "true", "--use_cpu", "true"),
        ]
    )
    return folder


@pytest.fixture(scope="module")
def sampler(told):
    return Sampler.load(told, device="cpu")


def share(samples, genre: str) -> float:
    """Of the words that are a genre's, how many are this one's."""
    words = " ".join(sample.text for sample in samples).replace(".", "").split()
    known = [word for word in words if word in WORDS["Sea"] + WORDS["Kitchen"]]
    return sum(word in WORDS[genre] for word in known) / len(known)


@pytest.mark.parametrize("genre", WORDS)
def test_genre_in_front_gives_the_words_of_that_genre(sampler, genre):
    asked = list(sampler.sample({"genre": genre, "name": "Number 7"}, num_samples=20))
    left_out = list(sampler.sample(num_samples=40))
    assert share(asked, genre) > 0.9 > share(left_out, genre)
    assert (asked[0].prompt, asked[0].fields) == (f"{genre} | Number 7:", {"genre": genre, "name": "Number 7"})
    assert not asked[0].text.startswith(genre), "the text is what was written alone"


def test_left_out_fields_are_sampled_too(sampler):
    samples = list(sampler.sample(num_samples=40))
    assert {sample.fields["genre"] for sample in samples} == set(WORDS)
    for genre in WORDS:
        assert share([sample for sample in samples if sample.fields["genre"] == genre], genre) > 0.8
    samples = list(sampler.sample([{"name": "Number 3"}], num_samples=12))
    assert (
        {sample.fields["genre"] for sample in samples} == set(WORDS) if sampler.template.learns_prompt else {"Kitchen"}
    )
    assert all(sample.fields["name"] == "Number 3" for sample in samples)


def test_a_sample_is_the_same_in_any_batch_and_when_it_is_gone_on_with(sampler):
    whole = list(sampler.sample(num_samples=7))
    assert list(sampler.sample(num_samples=7, batch_size=2)) == whole
    assert list(sampler.sample(num_samples=7, skip=4)) == whole[4:]


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_generate_writes_a_text_for_each_row_of_a_file(told, tmp_path, capsys):
    new = tmp_path / "new.csv"
    pd.DataFrame({"name": ["The Last Ferry", "Soup: a Tale"], "genre": ["Sea", ""], "year": [1, 2]}).to_csv(new)
    words = ["--model_dir", str(told), "--fields_file", str(new)]
    generate.main([*words, "--output", str(tmp_path / "out.jsonl")])
    rows = rows_of(tmp_path / "out.jsonl")
    assert [row["fields"]["name"] for row in rows] == ["The Last Ferry", "Soup: a Tale"]
    assert rows[0]["prompt"] == "Sea | The Last Ferry:"
    assert rows[1]["prompt"].endswith(r"| Soup\: a Tale:")
    capsys.readouterr()
    generate.main([*words[:2], "--fields", "genre=Sea", "name=The Last Ferry", "--num_samples", "1"])
    assert capsys.readouterr().out.startswith("  1. Sea | The Last Ferry: ")


BAD_FIELDS = {
    "an unknown field": (["--fields", "tilte=X"], "the model knows no tilte; give genre, name"),
    "the text itself": (["--fields", "plot=X"], "plot is what the model writes; give genre, name"),
    "no value": (["--fields", "genre"], "must be NAME=VALUE"),
    "one name twice": (["--fields", "genre=a", "genre=b"], "each name once"),
    "a prompt too": (["--fields", "genre=Sea", "--prompt", "A"], "give one of them"),
    "no file": (["--fields_file", "nowhere.csv"], "--fields_file nowhere.csv: no such file"),
}


@pytest.mark.parametrize("case", BAD_FIELDS)
def test_bad_fields_are_told_in_one_sentence(told, case):
    words, message = BAD_FIELDS[case]
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        generate.main(["--model_dir", str(told), *words])
    assert "\n" not in str(error.value)


def test_a_model_without_a_template_knows_no_fields(told, tokenizer):
    plain = Sampler(Sampler.load(told, device="cpu").model, tokenizer)
    with pytest.raises(ValueError, match="trained without --template"):
        plain.sample({"genre": "Sea"})


def test_samples_are_judged_as_texts_without_prompts(told, catalogue):
    args = parse_generate_args(["--model_dir", str(told)])
    texts = pd.read_csv(catalogue)["plot"].tolist()
    assert read_training_texts(args) == split_texts(texts, 0.1).train


def test_loss_of_a_run_is_that_of_what_it_learns(told, sampler, catalogue, tmp_path):
    template, tokenizer = find_template(sampler.tokenizer), sampler.tokenizer
    texts = split_texts(read_texts(catalogue, template=template), 0.1).validation
    tokens, *_ = tokenize_texts(texts, tokenizer, 256, tmp_path, template.learns_prompt)
    losses = []
    for row in tokens:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            logits = sampler.model(ids).logits[0, :-1]
        each = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        losses += each[row["prompt_length"] - 1 :].tolist()
    results = json.loads((told / "all_results.json").read_text())
    assert results["eval_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_eval_only_measures_as_the_run_learnt(told, capsys):
    train.main(["--eval_only", "--model_name_or_path", str(told), "--use_cpu", "true"])
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert results["same_texts_as_run"]
    assert results["template"] == "{genre} | {name}: {plot}"
    run = json.loads((told / "all_results.json").read_text())
    assert results["eval_loss"] == pytest.approx(run["eval_loss"], rel=1e-5)


def test_texts_while_it_trains_have_prompts(told):
    rows = rows_of(told / "progress_samples.jsonl")
    assert {row["step"] for row in rows} == {0, 120}
    for row in rows:
        assert row["text"].startswith(row["prompt"])
        assert row["prompt"].endswith(":")
    assert {row["prompt"].split(" |")[0] for row in rows if row["step"]} <= set(WORDS)
