"""A model that is trained with a template: what it learns, what it writes for given fields, and its figures."""

import csv
import json
import random

import pytest
import torch
from conftest import ON_CPU, read_jsonl

import generate
import train
from neoflix.arguments.generate import parse_generate_args
from neoflix.data.sources import read_examples
from neoflix.data.split import split_texts
from neoflix.data.template import Template
from neoflix.data.tokenizer import load_tokenizer
from neoflix.data.tokens import tokenize_texts
from neoflix.judging.judge import read_training_texts
from neoflix.runtime.errors import UserError
from neoflix.sampling.sampler import Sampler

pytestmark = pytest.mark.xdist_group("with_template")

PATTERN = "{genre} | {name}: {plot}"
WORDS = {"Sea": ["ship", "harbour", "sailor", "storm"], "Kitchen": ["cook", "soup", "kettle", "recipe"]}


@pytest.fixture(scope="module")
def genres(tmp_path_factory):
    """200 texts, half of them with words of the sea, half of the kitchen."""
    rng, rows = random.Random(1), []
    for number in range(200):
        genre = ("Sea", "Kitchen")[number % 2]
        one, other, third = rng.sample(WORDS[genre], 3)
        rows.append((genre, f"Number {number}", f"A {one} and a {other} meet the old {third} in year {number}."))
    path = tmp_path_factory.mktemp("genres") / "genres.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("genre", "name", "plot"), *rows])
    return path


@pytest.fixture(scope="module", params=["text", "prompt and text"])
def told(request, genres, model_dir):
    """A run with the template, trained on the text alone or on genre and name as well."""
    folder = genres.parent / request.param
    train.main(
        [
            *("--model_name_or_path", str(model_dir), "--dataset", str(genres), "--output_dir", str(folder)),
            *("--template", PATTERN, "--cache_dir", str(folder / "cache")),
            *("--loss_on_prompt", str(request.param == "prompt and text"), *ON_CPU),
            *("--per_device_train_batch_size", "16", "--learning_rate", "1e-2", "--max_steps", "120"),
            *("--save_strategy", "no", "--eval_strategy", "steps", "--eval_steps", "120"),
            *("--metric_for_best_model", "eval_loss", "--early_stopping_patience", "0"),
            *("--report_to", "none", "--disable_tqdm", "true", "--use_cpu", "true"),
        ]
    )
    return folder


@pytest.fixture(scope="module")
def sampler(told):
    return Sampler.load(told, device="cpu")


def share(samples, genre: str) -> float:
    """The share of one genre's words among the words of both genres."""
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
    found = {sample.fields["genre"] for sample in samples}
    assert found == (set(WORDS) if sampler.template.learns_prompt else {"Kitchen"})
    assert all(sample.fields["name"] == "Number 3" for sample in samples)


def test_a_sample_is_the_same_in_any_batch_and_after_skipped_ones(sampler):
    whole = list(sampler.sample(num_samples=7))
    assert list(sampler.sample(num_samples=7, batch_size=2)) == whole
    assert list(sampler.sample(num_samples=7, skip=4)) == whole[4:]


def test_generate_writes_a_text_for_each_row_of_a_file(told, tmp_path, capsys):
    new = tmp_path / "new.csv"
    new.write_text("name,genre,year\nThe Last Ferry,Sea,1\nSoup: a Tale,,2\n")
    words = ["--model_dir", str(told), "--fields_file", str(new)]
    generate.main([*words, "--output", str(tmp_path / "out.jsonl")])
    rows = read_jsonl(tmp_path / "out.jsonl")
    assert [row["fields"]["name"] for row in rows] == ["The Last Ferry", "Soup: a Tale"]
    assert rows[0]["prompt"] == "Sea | The Last Ferry:"
    assert rows[1]["prompt"].endswith(r"| Soup\: a Tale:")
    capsys.readouterr()
    generate.main([*words[:2], "--fields", "genre=Sea", "name=The Last Ferry", "--num_samples", "1"])
    assert capsys.readouterr().out.startswith("  1. Sea | The Last Ferry: ")


@pytest.mark.parametrize(
    ("words", "facts"),
    [
        (["--fields", "tilte=X"], ["tilte", "genre", "name"]),
        (["--fields", "plot=X"], ["plot", "genre", "name"]),
        (["--fields", "genre"], ["NAME=VALUE"]),
        (["--fields", "genre=a", "genre=b"], ["genre=b"]),
        (["--fields", "genre=Sea", "--prompt", "A"], ["--prompt"]),
        (["--fields_file", "nowhere.csv"], ["--fields_file nowhere.csv"]),
    ],
    ids=["unknown", "the text itself", "no value", "twice", "a prompt too", "no file"],
)
def test_bad_fields_are_refused(told, words, facts):
    with pytest.raises(UserError, match="--fields") as error:
        generate.main(["--model_dir", str(told), *words])
    assert "\n" not in str(error.value)
    assert all(fact in str(error.value) for fact in facts)


def test_a_model_without_a_template_has_no_fields(told, model_dir):
    plain = Sampler(Sampler.load(told, device="cpu").model, load_tokenizer(str(model_dir)))
    with pytest.raises(UserError, match="trained without --template"):
        plain.sample({"genre": "Sea"})


def test_samples_are_judged_as_texts_without_prompts(told, genres):
    args = parse_generate_args(["--model_dir", str(told)])
    train_side = split_texts(read_examples(genres, template=Template(PATTERN)), 0.1).train
    assert read_training_texts(args) == [example.completion.strip() for example in train_side]


def test_loss_of_a_run_is_that_of_what_it_learns(told, sampler, genres, tmp_path):
    held_out = split_texts(read_examples(genres, template=sampler.template), 0.1).validation
    tokens = tokenize_texts(held_out, sampler.tokenizer, 256, tmp_path, sampler.template.learns_prompt).dataset
    losses = []
    for row in tokens:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            logits = sampler.model(ids).logits[0, :-1]
        each = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        losses += each[row["prompt_length"] - 1 :].tolist()
    results = json.loads((told / "all_results.json").read_text())
    assert results["eval_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_eval_only_measures_as_the_run_did(told, capsys):
    train.main(["--eval_only", "--model_name_or_path", str(told), "--use_cpu", "true"])
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert results["same_texts_as_run"]
    assert results["template"] == PATTERN
    run = json.loads((told / "all_results.json").read_text())
    assert results["eval_loss"] == pytest.approx(run["eval_loss"], rel=1e-5)


def test_live_samples_have_prompts(told):
    rows = read_jsonl(told / "progress_samples.jsonl")
    assert {row["step"] for row in rows} == {0, 120}
    for row in rows:
        assert row["text"].startswith(row["prompt"])
        assert row["prompt"].endswith(":")
    assert {row["prompt"].split(" |")[0] for row in rows if row["step"]} <= set(WORDS)
