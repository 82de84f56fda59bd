"""`train.py --eval_only`: a run's own figure once more, a plain computation's, and nothing else touched."""

import csv
import hashlib
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from forked import launch
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from neoflix.checkpoints.find import list_checkpoints
from neoflix.checkpoints.names import RUN_FILE
from neoflix.data.sources import read_examples
from neoflix.data.split import split_texts
from neoflix.data.tokenizer import load_tokenizer
from neoflix.model.load import load_model
from neoflix.runtime.processes import exit_code_of

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def run_dir(model_dir, titles, tmp_path_factory):
    """A finished run with two checkpoints, the better one at the top, and the catalogue it was trained on."""
    home = tmp_path_factory.mktemp("home")
    with (home / "catalogue.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["synopsis"], *([text] for text in titles[:60])])
    words = [
        *(
            "--model_name_or_path",
            str(model_dir),
            "--dataset",
            str(home / "catalogue.csv"),
            "--text_column",
            "synopsis",
        ),
        *("--validation_fraction", "0.2", "--output_dir", str(home / "run"), "--cache_dir", str(home / "cache")),
        *("--per_device_train_batch_size", "8", "--learning_rate", "1e-3", "--num_train_epochs", "2"),
        *("--report_to", "none", "--disable_tqdm", "true", "--use_cpu", "true", "--deepspeed", "ds_configs/cpu.json"),
    ]
    launch(0, "train.py", *words)
    return home / "run"


@pytest.fixture
def measure(run_dir, capsys):
    """measure("folder", *more words) -> the line of JSON that --eval_only prints; its whole output is `said`."""

    def measure(model: Path | str, *words: str) -> dict:
        cache = ["--cache_dir", str(run_dir.parent / "cache")]
        train.main(["--eval_only", "--model_name_or_path", str(model), *cache, "--disable_tqdm", "false", *words])
        measure.said = capsys.readouterr().out
        return json.loads(next(line for line in measure.said.splitlines() if line.startswith("{")))

    return measure


def listing(folder: Path) -> dict:
    """Every path, with what its file holds and when it was written."""
    return {
        path: (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None)
        for path in [folder, *folder.rglob("*")]
    }


@torch.no_grad()
def plain_figures(model, tokenizer, texts: list[str]) -> tuple[float, float]:
    """(nats a token, bits a character), text by text."""
    total = count = 0
    for text in texts:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        total += model(ids, labels=ids).loss.item() * (ids.numel() - 1)
        count += ids.numel() - 1
    return total / count, total / math.log(2) / sum(map(len, texts))


def held_out(run_dir: Path) -> list[str]:
    examples = read_examples(run_dir.parent / "catalogue.csv", "synopsis")
    return [example.completion for example in split_texts(examples, 0.2).validation]


def test_a_run_gets_its_own_figure_on_its_own_texts(run_dir, measure):
    recorded = json.loads((run_dir / "all_results.json").read_text())
    before = listing(run_dir)
    found = measure(run_dir)  # data set, column and share: by the run's record
    assert found["eval_loss"] == pytest.approx(recorded["eval_loss"], rel=1e-6)
    assert found["perplexity"] == pytest.approx(recorded["perplexity"], rel=1e-6)
    assert found["eval_bits_per_char"] == pytest.approx(recorded["eval_bits_per_char"], rel=1e-6)
    assert found["same_texts_as_run"] is True
    assert found["dataset"] == str(run_dir.parent / "catalogue.csv")
    assert listing(run_dir) == before
    assert f"{found['perplexity']:.2f}" in measure.said
    assert "warning" not in measure.said

    model, tokenizer = AutoModelForCausalLM.from_pretrained(run_dir).eval(), AutoTokenizer.from_pretrained(run_dir)
    texts = held_out(run_dir)
    loss, bits = plain_figures(model, tokenizer, texts)
    assert found["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert found["eval_bits_per_char"] == pytest.approx(bits, rel=1e-5)
    assert found["eval_texts"] == len(texts)
    assert found["eval_tokens"] == sum(len(tokenizer(text)["input_ids"]) + 1 for text in texts)


def test_checkpoints_and_the_untouched_model_get_theirs(run_dir, model_dir, measure):
    history = json.loads((list_checkpoints(run_dir)[-1] / "trainer_state.json").read_text())["log_history"]
    recorded = {line["step"]: line["eval_loss"] for line in history if "eval_loss" in line}
    texts = ["--dataset", str(run_dir.parent / "catalogue.csv"), "--text_column", "synopsis"]
    before = listing(run_dir)
    found = {0: measure(model_dir, *texts, "--validation_fraction", "0.2")}
    assert found[0]["same_texts_as_run"] is None
    found |= {int(path.name.partition("-")[2]): measure(path) for path in list_checkpoints(run_dir)}
    assert len(found) == 3
    assert {step: figures["eval_loss"] for step, figures in found.items()} == pytest.approx(recorded, rel=1e-6)
    assert len(set(recorded.values())) == 3
    assert listing(run_dir) == before

    tokenizer = load_tokenizer(str(model_dir))
    model = load_model(str(model_dir), tokenizer, torch.float32, {}).eval()
    assert found[0]["eval_loss"] == pytest.approx(plain_figures(model, tokenizer, held_out(run_dir))[0], rel=1e-5)


def test_a_run_that_died_is_measured_by_its_best_checkpoint(run_dir, measure, tmp_path):
    newest = list_checkpoints(run_dir)[-1]
    shutil.copytree(newest, tmp_path / "died" / newest.name)
    shutil.copy(run_dir / RUN_FILE, tmp_path / "died")
    found = measure(tmp_path / "died")
    assert found["loaded_from"] == str(tmp_path / "died" / newest.name)
    assert found["eval_loss"] == measure(newest)["eval_loss"]


def test_other_texts_are_told_from_the_runs_own(run_dir, measure):
    """A larger share takes texts that were trained on; other texts and smaller shares only are not the same."""
    for words, was_trained_on in (["--validation_fraction", "0.5"], True), (["--dataset", "sample"], False):
        column = ["--text_column", "description"] if "sample" in words else []
        assert measure(run_dir, *words, *column)["same_texts_as_run"] is False
        assert "warning: these are not the texts" in measure.said
        assert ("trained on some of them" in measure.said) == was_trained_on


def test_a_model_from_scratch_has_a_vocabulary_of_its_own(measure):
    found = measure("demo", "--dataset", "sample")
    assert found["perplexity"] > 1000
    assert f"per token of this model's {found['vocab_size']:,}" in measure.said


def test_lines_add_up_where_a_folder_is_named(run_dir, model_dir, measure, tmp_path):
    folder = tmp_path / "figures"
    found = [measure(model, "--output_dir", str(folder), "--dataset", "sample", "--text_column", "description")
             for model in (run_dir, model_dir)]  # fmt: skip
    assert [json.loads(line) for line in (folder / "eval_results.jsonl").read_text().splitlines()] == found
    assert [path.name for path in folder.iterdir()] == ["eval_results.jsonl"]


def test_a_recipe_names_no_folder_to_write_to(run_dir, measure, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(
        "output_dir: results\ndataset: sample\nreport_to: tensorboard\neval_strategy: epoch\n"
    )
    assert measure(run_dir, "--config", "recipe.yaml")["same_texts_as_run"] is True
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_two_processes_find_what_one_does(run_dir, measure):
    words = ["--eval_only", "--model_name_or_path", str(run_dir), "--cache_dir", str(run_dir.parent / "cache")]
    said = launch(2, "train.py", *words, "--use_cpu", "true", "--per_device_eval_batch_size", "2")
    (line,) = [line for line in said.splitlines() if line.startswith('{"model"')]
    assert json.loads(line)["eval_loss"] == pytest.approx(measure(run_dir)["eval_loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--validation_fraction", "0"], "--validation_fraction 0"),
        (["--plan"], "leave it out"),
        (["--output_dir", "{run}"], "is a run's folder"),
        (["--output_dir", "{run}/figures"], "is a run's folder"),
        (["--model_name_or_path", "{run}/../cache"], "holds no model and no complete checkpoint"),
        (["--dataset", "none.csv"], "no such file"),
    ],
)
def test_what_it_cannot_measure_is_one_sentence(run_dir, words, message, capsys):
    before = listing(run_dir)
    words = [word.replace("{run}", str(run_dir)) for word in words]
    assert exit_code_of(lambda: train.main(["--eval_only", "--model_name_or_path", str(run_dir), *words])) == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in said
    assert listing(run_dir) == before
