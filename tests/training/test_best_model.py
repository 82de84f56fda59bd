"""The model that a run saves is the one whose figures it reports; one that diverged is neither saved nor reported."""

import json
import math
from pathlib import Path

import pytest
from conftest import ON_CPU, results

import train
from neoflix.checkpoints.find import list_checkpoints
from neoflix.reporting.history import Record
from neoflix.runtime.files import hash_file, write_json
from neoflix.runtime.processes import exit_code_of
from neoflix.training.trainer import TokenTrainer

WORDS = [*ON_CPU, "--max_steps", "6", "--num_progress_samples", "0"]


def measured(folder: Path, capsys, train_words: list[str]) -> float:
    """The loss of the model at the top of a run's folder, by `--eval_only`."""
    capsys.readouterr()
    train.main(["--eval_only", "true", "--model_name_or_path", str(folder), *train_words[2:4], "--use_cpu", "true"])
    return json.loads(capsys.readouterr().out.splitlines()[-1])["eval_loss"]


EVERY_SECOND = ["--eval_strategy", "steps", "--eval_steps", "2", "--save_strategy", "steps", "--save_steps", "2"]
SCHEDULES = {
    "never": ["--eval_strategy", "no"],
    "late": ["--eval_strategy", "steps", "--eval_steps", "2", "--eval_delay", "100"],
    "never, nor saved": ["--eval_strategy", "no", "--save_strategy", "no"],
    "evaluated, never saved": ["--eval_strategy", "steps", "--eval_steps", "2", "--save_strategy", "no"],
    "saved at other steps": [*EVERY_SECOND[:3], "4", "--save_strategy", "steps", "--save_steps", "5"],
    "by another metric": ["--eval_strategy", "epoch", "--metric_for_best_model", "bits_per_char"],
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_figures_are_those_of_the_saved_model(run, train_words, capsys, name):
    folder = run("run", *WORDS, *SCHEDULES[name])
    figures = results(folder)
    assert figures["eval_loss"] == pytest.approx(measured(folder, capsys, train_words), rel=1e-6)
    assert figures["perplexity"] == pytest.approx(math.exp(figures["eval_loss"]))
    assert figures["saved_step"] == 6
    best = Record.read(folder).best
    assert (best["step"], best["eval_loss"]) == (figures["saved_step"], figures["eval_loss"])


def test_a_damaged_or_missing_best_checkpoint_gives_way_to_the_next(run, train_words, capsys, monkeypatch):
    """Damaged without a change of size, behind the run's back, before the best one is taken."""
    choose = TokenTrainer._choose_best

    def damage_and_choose(self):
        path = Path(self.args.output_dir, "checkpoint-6", "config.json")
        path.write_bytes(b" " * path.stat().st_size)
        return choose(self)

    monkeypatch.setattr(TokenTrainer, "_choose_best", damage_and_choose)
    folder = run("run", *WORDS, *EVERY_SECOND, "--save_total_limit", "9")
    assert results(folder)["saved_step"] == 4
    assert "checkpoint-6 is not used as the best model: " in capsys.readouterr().out
    assert results(folder)["eval_loss"] == pytest.approx(measured(folder, capsys, train_words), rel=1e-6)


def test_without_held_out_texts_there_are_no_figures(run):
    folder = run("run", *WORDS, "--validation_fraction", "0")
    assert not {"eval_loss", "perplexity", "saved_step"} & results(folder).keys()
    assert Record.read(folder).best is None


def test_a_run_that_died_before_its_last_evaluation_is_evaluated_all_the_same(run):
    folder = run("run", *WORDS, "--eval_strategy", "no")
    figures = results(folder)
    state = folder / "checkpoint-6" / "trainer_state.json"
    history = json.loads(state.read_text())
    history["log_history"] = [line for line in history["log_history"] if line.get("step") == 0]
    state.write_text(json.dumps(history))
    (folder / "all_results.json").unlink()
    manifest = json.loads((folder / "checkpoint-6" / "manifest.json").read_text())
    manifest["files"]["trainer_state.json"] = hash_file(state)
    (folder / "checkpoint-6" / "manifest.json").write_text(json.dumps(manifest))
    run("run", *WORDS, "--eval_strategy", "no")
    assert results(folder)["eval_loss"] == figures["eval_loss"]


# ---- divergence --------------------------------------------------------------------------------------------

EXPLODES = [*ON_CPU, "--max_steps", "8", "--learning_rate", "1e39", "--max_grad_norm", "1e9", "--warmup_steps", "0"]
EXPLODES += ["--lr_scheduler_type", "constant", "--logging_first_step", "false"]
SPARSE = {
    "large logging_steps": ["--logging_steps", "100"],
    "no log": ["--logging_strategy", "no"],
    "a log an epoch": ["--logging_strategy", "epoch"],
    "nothing held out": ["--logging_steps", "100", "--validation_fraction", "0", "--save_strategy", "no"],
    "an evaluation within": ["--logging_steps", "100", "--eval_strategy", "steps", "--eval_steps", "3"],
    "a save within": ["--logging_steps", "100", *EVERY_SECOND[4:], "--eval_strategy", "no"],
    "the last step alone": ["--logging_steps", "100", "--max_steps", "1", "--validation_fraction", "0"],
}


def read_strictly(path: Path):
    def refuse(token):
        raise AssertionError(f"{path}: {token} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.mark.parametrize("name", SPARSE)
def test_a_diverged_model_is_never_promoted(train_words, tmp_path, capfd, name):
    words = [*train_words, *EXPLODES, *SPARSE[name]]
    assert exit_code_of(lambda: train.main(words)) == 1
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "use a lower --learning_rate than 1e+39" in errors[0]
    folder = tmp_path / "run"
    assert not (folder / "all_results.json").exists()
    assert not (folder / "model.safetensors").exists()
    assert not list_checkpoints(folder)
    for path in folder.rglob("*.json"):
        read_strictly(path)


def test_json_has_no_nan(tmp_path):
    write_json(tmp_path / "a.json", {"a": [1.5, math.nan, {"b": math.inf}], "c": -math.inf, "d": "NaN"})
    assert read_strictly(tmp_path / "a.json") == {"a": [1.5, None, {"b": None}], "c": None, "d": "NaN"}
