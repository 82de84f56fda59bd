"""Checkpoints are whole, and the model that a run saves is the one whose figures it reports."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ON_CPU, ROOT, assert_same_weights, results, weights
from forked import launch
from transformers import AutoModelForCausalLM

import train
from neoflix.checkpoints.find import list_checkpoints
from neoflix.reporting.history import Record
from neoflix.runtime.files import hash_file
from neoflix.training import saving

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
    choose = saving.choose_best

    def damage_and_choose(args, state):
        path = Path(args.output_dir, "checkpoint-6", "config.json")
        path.write_bytes(b" " * path.stat().st_size)
        return choose(args, state)

    monkeypatch.setattr(saving, "choose_best", damage_and_choose)
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


# ---- ZeRO stages ----------------------------------------------------------------------------------------------------

# Several runs of two processes in one start of the launcher, most of whose seconds are imports.
DRIVER = f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r})
import train
from pathlib import Path
from neoflix.runtime.processes import run_and_exit

def main():
    for words in json.loads(Path(sys.argv[-1]).read_text()):
        train.main(words)

run_and_exit(main)
"""


@pytest.fixture(scope="module")
def stages(tmp_path_factory, model_dir):
    """Finished runs of two processes, "zero-0" to "zero-3", and "unsaved", at stage 3 without a checkpoint."""
    folder = tmp_path_factory.mktemp("stages")
    base = json.loads((ROOT / "ds_configs" / "cpu.json").read_text())
    runs = []
    for name, stage in {**{f"zero-{stage}": stage for stage in range(4)}, "unsaved": 3}.items():
        config = json.dumps(base | {"zero_optimization": {"stage": stage}})
        runs.append(
            [
                *("--model_name_or_path", str(model_dir), "--dataset", "sample", "--cache_dir", str(folder / "cache")),
                *("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1", "--use_cpu", "true"),
                *("--report_to", "none", "--disable_tqdm", "true", "--max_steps", "2", "--eval_strategy", "no"),
                *("--save_strategy", "no" if name == "unsaved" else "epoch", "--output_dir", str(folder / name)),
                *("--deepspeed", config, "--num_progress_samples", "0"),
            ]
        )
    (folder / "runs.json").write_text(json.dumps(runs))
    (folder / "driver.py").write_text(DRIVER)
    launch(2, folder / "driver.py", folder / "runs.json")
    return folder


@pytest.mark.parametrize("name", ["zero-0", "zero-1", "zero-2", "zero-3"])
@pytest.mark.process
def test_every_stage_saves_whole_weights(stages, name):
    for folder in (stages / name, stages / name / "checkpoint-2"):
        _, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert "lm_head.weight" not in weights(folder), "tied weights lie on disk twice"
    assert_same_weights(stages / name, stages / "zero-0", atol=1e-5, rtol=1e-4)


@pytest.mark.process
def test_zero_3_saves_the_model_in_memory_where_there_is_no_checkpoint(stages):
    assert not list_checkpoints(stages / "unsaved")
    assert_same_weights(stages / "unsaved", stages / "zero-3")
    assert results(stages / "unsaved")["saved_step"] == 2
    assert not list((stages / "unsaved").glob("*.part"))


@pytest.mark.process
def test_a_checkpoint_of_an_earlier_version_without_weights_is_not_the_best(stages, tmp_path, capsys):
    run = shutil.copytree(stages / "zero-3", tmp_path / "run")
    checkpoint = run / "checkpoint-2"
    (checkpoint / "model.safetensors").unlink()
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    del manifest["files"]["model.safetensors"]
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    args = SimpleNamespace(output_dir=str(run), metric_for_best_model="loss", greater_is_better=False)
    state = SimpleNamespace(global_step=2, log_history=[{"step": 2, "eval_loss": 5.0}])
    assert saving.choose_best(args, state) == (2, None)
    assert "model.safetensors" in capsys.readouterr().out


@pytest.mark.parametrize(("greater", "order"), [(False, [6, 2, 4]), (True, [4, 2, 6])])
def test_evaluated_steps_are_ranked_by_their_metric(greater, order):
    lines = [(0, 0.5), (2, 3.0), (4, 4.0), (6, 2.0), (8, math.nan)]
    state = SimpleNamespace(log_history=[{"step": step, "eval_loss": loss} for step, loss in lines] + [{"step": 9}])
    args = SimpleNamespace(metric_for_best_model="loss", greater_is_better=greater)
    assert saving.rank_steps(args, state) == order
    args.metric_for_best_model = None
    assert saving.rank_steps(args, state) == []
