"""Which starts continue a run, and what may change within it."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import ON_CPU, losses, results, save_checkpoint

from neoflix.checkpoints.find import list_checkpoints
from neoflix.checkpoints.manifest import write_manifest
from neoflix.checkpoints.runs import save_run
from neoflix.checkpoints.same_run import OVERRIDABLE, find_differences
from neoflix.checkpoints.start import find_start, rewind
from neoflix.runtime.errors import UserError
from neoflix.training.trainer import TokenTrainer


@pytest.fixture
def saved(describe, tmp_path):
    """(folder, record) of a run with a checkpoint at step 4."""
    folder, record = tmp_path / "run", describe()
    checkpoint = folder / "checkpoint-4"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").touch()
    write_manifest(checkpoint, {"step": 4, "best_step": None}, {})
    save_run(folder, record)
    return folder, record


CHANGES = {
    "learning_rate": ["--learning_rate", "1e-9"],
    "seed": ["--seed", "7"],
    "data_seed": ["--data_seed", "7"],
    "weight_decay": ["--weight_decay", "0.5"],
    "max_grad_norm": ["--max_grad_norm", "0.5"],
    "adam_beta2": ["--adam_beta2", "0.95"],
    "train_sampling_strategy": ["--train_sampling_strategy", "group_by_length"],
    "lr_scheduler_kwargs": ["--lr_scheduler_kwargs", '{"num_cycles": 2}'],
    "early_stopping_patience": ["--early_stopping_patience", "5"],
    "eval_delay": ["--eval_delay", "1"],
    "max_steps": ["--max_steps", "3"],
    "tokens_per_device_batch": ["--tokens_per_device_batch", "256"],
    "texts_per_step": ["--per_device_train_batch_size", "4"],
    "lora": ["--lora", "true"],
    "validation_fraction was 0.1, is now 0.2": ["--validation_fraction", "0.2"],
    "max_length was unset, is now 20": ["--max_length", "20"],
    "template": ["--template", "{title}: {description}"],
    "deepspeed optimizer.params.bias_correction": [
        "--deepspeed",
        {"optimizer": {"params": {"bias_correction": False}}},
    ],
    "deepspeed data_types.grad_accum_dtype": ["--deepspeed", {"data_types": {"grad_accum_dtype": "bf16"}}],
}
SAME = [
    ["--logging_steps", "3", "--report_to", "tensorboard", "--disable_tqdm", "false", "--run_name", "x"],
    ["--dataloader_num_workers", "2", "--dataloader_persistent_workers", "true", "--dataloader_prefetch_factor", "4"],
    ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4", "--per_device_eval_batch_size", "3"],
    ["--save_total_limit", "9", "--num_progress_samples", "0", "--sample_prompts", "A", "B"],
    ["--activation_checkpointing", "true", "--eval_on_start", "false", "--plan_must_fit", "false"],
    ["--deepspeed", "ds_configs/no_offload.json"],
    ["--deepspeed", {"steps_per_print": 7, "zero_optimization": {"stage": 1}}],
]


def as_words(words: list, tmp_path) -> list[str]:
    """Flags, with our DeepSpeed file changed where a dict says how."""
    if not isinstance(words[-1], dict):
        return words
    config = json.loads(json.dumps(BASE_DEEPSPEED))
    for block, values in words[-1].items():
        if block == "optimizer":
            config[block]["params"] |= values["params"]
        else:
            config[block] = values
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps(config))
    return ["--deepspeed", str(path)]


BASE_DEEPSPEED = {
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "zero_optimization": {"stage": 2},
    "gradient_clipping": "auto",
    "gradient_accumulation_steps": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
}


@pytest.mark.parametrize("name", CHANGES)
def test_whatever_changes_what_is_learned_is_refused_by_name(describe, saved, tmp_path, name):
    folder, _ = saved
    changed = describe("--output_dir", str(tmp_path / "new"), *as_words(CHANGES[name], tmp_path))
    with pytest.raises(UserError, match=name) as error:
        find_start(str(folder), None, changed, None)
    assert "choose another --output_dir" in str(error.value)
    assert ("--override_resumed" in str(error.value)) == (name in OVERRIDABLE)


@pytest.mark.parametrize("words", SAME, ids=lambda words: words[0])
def test_whatever_does_not_is_no_other_run(describe, saved, tmp_path, words):
    folder, record = saved
    same = describe("--output_dir", str(tmp_path / "new"), *as_words(words, tmp_path))
    assert not find_differences(record, same)
    start = find_start(str(folder), None, same, None)
    assert (start.from_step, start.changes) == (4, ())


def test_all_differences_are_named_in_one_sentence(describe, saved, tmp_path):
    folder, _ = saved
    changed = describe("--output_dir", str(tmp_path / "new"), "--learning_rate", "1e-9", "--weight_decay", "0.5")
    with pytest.raises(UserError, match=r"learning_rate \(was 0.001, is now 1e-09\), another weight_decay") as error:
        find_start(str(folder), None, changed, None)
    assert str(error.value).endswith(
        "or add --override_resumed learning_rate weight_decay to go on from step 4 with the new ones"
    )


def test_a_change_is_undone_where_the_run_goes_back_before_it(saved):
    _, record = saved
    changes = [
        {"from_step": 4, "setting": "learning_rate", "was": 1e-3, "now": 1e-4},
        {"from_step": 9, "setting": "learning_rate", "was": 1e-4, "now": 1e-5},
    ]
    record = record | {"arguments": record["arguments"] | {"learning_rate": 1e-5}, "changes": changes}
    for step, rate, num_changes in ((10, 1e-5, 2), (9, 1e-4, 1), (5, 1e-4, 1), (4, 1e-3, 0)):
        at_step = rewind(record, step)
        assert (at_step["arguments"]["learning_rate"], len(at_step["changes"])) == (rate, num_changes)


def test_a_later_checkpoint_of_the_old_settings_would_be_mistaken_for_one_of_the_new(describe, saved, tmp_path):
    folder, _ = saved
    save_checkpoint(folder / "checkpoint-8", 8)
    (folder / "checkpoint-12").mkdir()  # not complete: no one resumes from it
    changed = describe("--output_dir", str(tmp_path / "new"), "--learning_rate", "1e-9")
    with pytest.raises(UserError, match=r"learning_rate.* checkpoint-8 "):
        find_start(str(folder), str(folder / "checkpoint-4"), changed, ["learning_rate"])


def test_a_copy_of_a_checkpoint_under_a_later_number_does_not_count(describe, saved, tmp_path):
    folder, _ = saved
    shutil.copytree(folder / "checkpoint-4", folder / "checkpoint-8")
    changed = describe("--output_dir", str(tmp_path / "new"), "--learning_rate", "1e-9")
    for asked in (str(folder / "checkpoint-4"), None):
        start = find_start(str(folder), asked, changed, ["learning_rate"])
        assert (Path(start.checkpoint).name, start.from_step) == ("checkpoint-4", 4)


# ---- whole runs --------------------------------------------------------------------------------------------

STEPS = [*ON_CPU, "--eval_strategy", "steps", "--eval_steps", "4", "--save_strategy", "steps", "--save_steps", "4"]


def contents(folder) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_with_other_settings_is_refused_and_untouched(run):
    folder = run("run", "--max_steps", "4", *STEPS)
    before = contents(folder)
    with pytest.raises(UserError, match=r"another learning_rate \(was 0.001, is now 1e-09\), another seed"):
        run("run", "--max_steps", "4", *STEPS, "--learning_rate", "1e-9", "--seed", "7")
    with pytest.raises(UserError, match=r"--learning_rate had no effect, because the run is complete at step 4"):
        run("run", "--max_steps", "4", *STEPS, "--learning_rate", "1e-9", "--override_resumed", "learning_rate")
    assert contents(folder) == before


@pytest.mark.parametrize("deepspeed", ["ds_configs/cpu.json", "ds_config.json", "ds_configs/zero3_offload.json"])
def test_new_rate_and_weight_decay_take_effect_and_are_recorded(run, monkeypatch, deepspeed):
    trainers, init = [], TokenTrainer.__init__
    monkeypatch.setattr(TokenTrainer, "__init__", lambda self, *a, **k: trainers.append(self) or init(self, *a, **k))
    words = ["--lr_scheduler_type", "linear", "--warmup_steps", "0", *STEPS, "--deepspeed", deepspeed]
    run("run", "--max_steps", "4", *words, "--learning_rate", "1e-3")
    changed = ["--max_steps", "8", *words, "--learning_rate", "4e-4", "--weight_decay", "0.5"]
    folder = run("run", *changed, "--override_resumed", "learning_rate", "weight-decay")
    groups = trainers[-1].optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    assert [group["lr"] for group in groups] == [0.0, 0.0]
    rates = losses(folder, "learning_rate")
    assert rates[4:] == pytest.approx([4e-4 * (1 - step / 8) for step in range(5, 9)], abs=1e-9)
    record = json.loads((folder / "run.json").read_text())
    assert record["arguments"]["learning_rate"] == 4e-4
    assert {(c["from_step"], c["setting"], c["was"], c["now"]) for c in record["changes"]} == {
        (4, "learning_rate", 1e-3, 4e-4),
        (4, "weight_decay", 0.01, 0.5),
        (4, "max_steps", 4, 8),
    }
    before = contents(folder)
    run("run", *changed)  # the same run now, without the flag
    assert contents(folder) == before
    assert "learning_rate 0.001 -&gt; 0.0004 from step 4" in (folder / "report.html").read_text()


def test_a_new_length_sets_a_new_schedule_at_once(run):
    words = ["--lr_scheduler_type", "linear", "--warmup_steps", "0", *STEPS]
    run("run", "--max_steps", "4", *words)
    folder = run("run", "--max_steps", "8", *words)
    assert losses(folder, "learning_rate")[4:] == pytest.approx(
        [1e-3 * (1 - step / 8) for step in range(5, 9)], abs=1e-9
    )


def test_a_start_that_fails_before_its_first_step_leaves_the_record(run, monkeypatch):
    folder = run("run", "--max_steps", "4", *STEPS)
    before = contents(folder)

    def fail(*args):
        raise RuntimeError("of our own making")

    monkeypatch.setattr(TokenTrainer, "training_step", fail)
    with pytest.raises(RuntimeError, match="of our own making"):
        run("run", "--max_steps", "8", *STEPS, "--learning_rate", "1e-4", "--override_resumed", "learning_rate")
    assert contents(folder) == before


def test_after_early_stopping_more_epochs_are_not_enough(run, capsys):
    words = [*ON_CPU, "--learning_rate", "1", "--early_stopping_patience", "1"]
    folder = run("run", "--num_train_epochs", "9", *words)
    num_steps = results(folder)["global_step"]
    assert results(folder)["epoch"] < 9
    before = contents(folder)
    capsys.readouterr()
    run("run", "--num_train_epochs", "9", *words)
    assert "ended early" in capsys.readouterr().out
    with pytest.raises(UserError, match=f"ended early, at step {num_steps}, .*--override_resumed early_stopping"):
        run("run", "--num_train_epochs", "10", *words)
    assert contents(folder) == before
    words[-1] = "0"
    run("run", "--num_train_epochs", "5", *words, "--override_resumed", "early_stopping_patience", "num_train_epochs")
    assert results(folder)["epoch"] == 5


def test_new_intervals_hold_from_the_resumed_step_on(run):
    run("run", "--max_steps", "4", *STEPS)
    words = ["--max_steps", "8", *STEPS[:-1], "2", "--override_resumed", "save_steps", "--save_total_limit", "9"]
    folder = run("run", *words)
    assert [path.name for path in list_checkpoints(folder)] == [f"checkpoint-{step}" for step in (4, 6, 8)]


def test_an_older_record_is_resumed_with_one_sentence(run, capsys):
    folder = run("run", "--max_steps", "4", *STEPS)
    record = json.loads((folder / "run.json").read_text())
    for key in ("held_out", "deepspeed", "changes"):
        del record[key]
    older = {"num_train_epochs", "max_steps", "learning_rate", "seed", "optim"}
    record["arguments"] = {key: value for key, value in record["arguments"].items() if key in older}
    (folder / "run.json").write_text(json.dumps(record))
    capsys.readouterr()
    run("run", "--max_steps", "6", *STEPS)
    said = capsys.readouterr().out
    assert said.count("run.json is from an earlier version") == 1
    assert results(folder)["global_step"] == 6
    now = json.loads((folder / "run.json").read_text())
    assert now["arguments"] == record["arguments"] | {"max_steps": 6}, "nothing is claimed that is not known"
