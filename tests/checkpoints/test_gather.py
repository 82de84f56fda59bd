"""Whole weights from what any ZeRO stage saved, by one process and by two, gathering switched off included."""

import fcntl
import json
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import PYTHON, ROOT
from forked import launch
from safetensors.torch import load_file
from test_source import PickleBomb
from transformers import AutoModelForCausalLM

import generate
import train
from neoflix.checkpoints import gather as consolidation
from neoflix.checkpoints.find import find_model
from neoflix.checkpoints.gather import _gather, _open_shards, gather_weights, whole_weights
from neoflix.checkpoints.manifest import MANIFEST, find_corruption, read_manifest, write_manifest
from neoflix.checkpoints.names import RESULTS_FILE, RUN_FILE
from neoflix.export import main
from neoflix.model.folder import has_shards_alone
from neoflix.runtime.files import HashedFile
from neoflix.runtime.processes import exit_code_of

WEIGHTS = "model.safetensors"
EVERY_SECOND = ["--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2"]
EVALUATED = ["--eval_strategy", "steps", "--eval_steps", "2"]

# Several runs in one start of the launcher, most of whose seconds are imports. A run named "resumed" goes on from the
# first checkpoint of the run named after it.
DRIVER = f"""
import json, shutil, sys
sys.path.insert(0, {str(ROOT)!r})
import train
from pathlib import Path
from neoflix.runtime.processes import run_on_main_process, run_and_exit

def die_after_first_checkpoint(run, copy):
    shutil.copytree(run / "checkpoint-2", copy / "checkpoint-2")
    shutil.copy(run / "run.json", copy)

def main():
    for name, words in json.loads(Path(sys.argv[-1]).read_text()).items():
        folder = Path(sys.argv[-1]).parent / name
        if name == "resumed":
            run_on_main_process(die_after_first_checkpoint, folder.with_name("sharded"), folder)
        train.main([*words, "--output_dir", str(folder)])

run_and_exit(main)
"""


def train_all(folder: Path, model_dir: Path, num_processes: int, names: dict[str, list[str]], *words: str) -> Path:
    """Trains runs of these names, each with the DeepSpeed file of the name that its words begin with."""
    common = [
        *("--model_name_or_path", str(model_dir), "--dataset", "sample", "--cache_dir", str(folder / "cache")),
        *("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1", "--learning_rate", "1e-3"),
        *("--report_to", "none", "--disable_tqdm", "true", "--use_cpu", "true", *EVERY_SECOND, *words),
    ]
    zero = {f"zero-{stage}": {"stage": stage} for stage in (0, 1, 2)}
    zero |= {
        name: {"stage": 3, "stage3_gather_16bit_weights_on_model_save": gather}
        for name, gather in (("gathers", True), ("shards", False))
    }
    base = json.loads((ROOT / "ds_configs" / "cpu.json").read_text())
    for name, block in zero.items():
        (folder / f"{name}.json").write_text(json.dumps(base | {"zero_optimization": block}))
    runs = {
        name: [*common, "--deepspeed", str(folder / f"{config}.json"), *more] for name, (config, *more) in names.items()
    }
    (folder / "runs.json").write_text(json.dumps(runs))
    (folder / "driver.py").write_text(DRIVER)
    launch(num_processes if num_processes > 1 else 0, folder / "driver.py", folder / "runs.json")
    return folder


PAIR = {"gathered": ["gathers", *EVALUATED], "sharded": ["shards", *EVALUATED]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, model_dir):
    """Finished runs of two processes in bf16: "zero-0" to "zero-2" and, at stage 3, "gathered", "sharded" (gathering
    switched off), "resumed" and "unevaluated" (both sharded)."""
    names = {f"zero-{stage}": [f"zero-{stage}", "--eval_strategy", "no"] for stage in (0, 1, 2)} | PAIR
    names |= {"resumed": PAIR["sharded"], "unevaluated": ["shards", "--eval_strategy", "no"]}
    return train_all(tmp_path_factory.mktemp("runs"), model_dir, 2, names, "--bf16", "true")


@pytest.fixture(scope="module")
def runs_of_one(tmp_path_factory, model_dir):
    """Finished runs of one process in fp32: "gathered" and "sharded"."""
    return train_all(tmp_path_factory.mktemp("runs-of-one"), model_dir, 1, PAIR)


def died(run: Path, copy: Path) -> Path:
    """A run as it was when it died after its first checkpoint."""
    shutil.copytree(run / "checkpoint-2", copy / "checkpoint-2")
    shutil.copy(run / RUN_FILE, copy)
    return copy


@pytest.fixture
def unfinished(runs, tmp_path):
    return died(runs / "sharded", tmp_path / "unfinished")


@pytest.fixture
def checkpoint(unfinished):
    return unfinished / "checkpoint-2"


def assert_same_weights(one: Path, other: Path) -> None:
    ours, theirs = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    assert ours.keys() == theirs.keys(), "tied weights among them?"
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype
        assert torch.equal(ours[name], theirs[name]), name


def sample(model_dir: Path, output: Path) -> str:
    generate.main(["--model_dir", str(model_dir), "--num_samples", "3", "--output", str(output)])
    return output.read_text()


@pytest.mark.parametrize("runs_of", ["runs", "runs_of_one"])
def test_a_run_that_died_is_sampled_as_if_it_had_gathered(runs_of, request, tmp_path, capsys):
    runs = request.getfixturevalue(runs_of)
    unfinished = died(runs / "sharded", tmp_path / "unfinished")
    checkpoint = unfinished / "checkpoint-2"
    assert has_shards_alone(checkpoint), "nothing to gather"
    before = read_manifest(checkpoint)["files"]
    texts = sample(unfinished, tmp_path / "texts.jsonl")
    assert capsys.readouterr().out.count("gathering") == 1
    assert_same_weights(checkpoint, runs / "gathered" / "checkpoint-2")
    assert texts == sample(died(runs / "gathered", tmp_path / "gathered"), tmp_path / "others.jsonl")

    # The checkpoint is complete as before, and with the new file.
    assert find_corruption(checkpoint, checksums=True) is None
    files = read_manifest(checkpoint)["files"]
    assert files.keys() - before.keys() == {WEIGHTS}
    assert {name: files[name] for name in before} == before
    assert not list(checkpoint.glob("*.part"))

    # Once is enough: one file now, which from_pretrained takes too.
    stamp = (checkpoint / WEIGHTS).stat().st_mtime_ns
    assert sample(checkpoint, tmp_path / "again.jsonl") == texts
    assert (checkpoint / WEIGHTS).stat().st_mtime_ns == stamp
    assert AutoModelForCausalLM.from_pretrained(checkpoint).lm_head.weight.shape[0] == 512


def test_a_checkpoint_of_shards_is_measured_and_left_as_it_is(runs, unfinished, capsys):
    before = {path: path.stat().st_mtime_ns for path in unfinished.rglob("*")}
    figures = []
    for checkpoint in (unfinished / "checkpoint-2", runs / "gathered" / "checkpoint-2"):
        train.main(["--eval_only", "--model_name_or_path", str(checkpoint), "--bf16", "true", "--use_cpu", "true"])
        lines = capsys.readouterr().out.splitlines()
        figures.append(json.loads(next(line for line in lines if line.startswith('{"model"'))))
    assert figures[0]["eval_loss"] == figures[1]["eval_loss"]
    assert figures[0]["same_texts_as_run"] is True
    assert {path: path.stat().st_mtime_ns for path in unfinished.rglob("*")} == before


def test_shards_are_exported_as_if_they_had_been_gathered(runs, unfinished, tmp_path):
    died(runs / "gathered", tmp_path / "gathered")
    for run in (unfinished, tmp_path / "gathered"):
        main(["--to", "gpt2", str(run), str(tmp_path / f"{run.name}-gpt2")])
    assert_same_weights(tmp_path / "unfinished-gpt2", tmp_path / "gathered-gpt2")


def test_an_older_model_on_top_is_not_what_a_new_run_is_sampled_from(runs, unfinished):
    for path in (runs / "zero-0").iterdir():
        if path.is_file() and path.name not in (RESULTS_FILE, RUN_FILE):
            shutil.copy(path, unfinished)
    assert find_model(str(unfinished)) == unfinished / "checkpoint-2"
    (unfinished / RESULTS_FILE).write_text("{}")
    assert find_model(str(unfinished)) == unfinished


@pytest.mark.parametrize("runs_of", ["runs", "runs_of_one"])
def test_a_finished_run_has_whole_weights_on_top(runs_of, request):
    runs = request.getfixturevalue(runs_of)
    assert_same_weights(runs / "sharded", runs / "gathered")
    assert "lm_head.weight" not in load_file(runs / "sharded" / WEIGHTS)
    assert (runs / "sharded" / WEIGHTS).samefile(runs / "sharded" / "checkpoint-4" / WEIGHTS), "weights lie there twice"
    assert find_corruption(runs / "sharded" / "checkpoint-4", checksums=True) is None


def test_a_run_without_evaluation_has_the_last_weights_on_top(runs, tmp_path):
    last = shutil.copytree(runs / "unevaluated" / "checkpoint-4", tmp_path / "last")
    gather_weights(last)
    assert_same_weights(runs / "unevaluated", last)


def test_a_run_goes_on_from_shards(runs):
    assert_same_weights(runs / "resumed", runs / "sharded")


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_every_other_stage_saves_whole_weights(runs, stage):
    for folder in (runs / f"zero-{stage}", runs / f"zero-{stage}" / "checkpoint-2"):
        _, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_shards_are_opened_anew_now_and_then(runs, checkpoint, monkeypatch):
    """Here before every weight: what was read does not stay in memory."""
    opened, open_shards = [], _open_shards
    monkeypatch.setattr(consolidation, "MAPPED_BYTES", 0)
    monkeypatch.setattr(consolidation, "_open_shards", lambda folder: opened.append(folder) or open_shards(folder))
    gather_weights(checkpoint)
    assert len(opened) == len(load_file(checkpoint / WEIGHTS))
    assert_same_weights(checkpoint, runs / "gathered" / "checkpoint-2")


def test_an_interrupted_gathering_counts_for_nothing(runs, checkpoint, monkeypatch):
    write, written = HashedFile.write, []

    def die(self, data):
        written.append(write(self, data))
        if len(written) == 9:
            raise KeyboardInterrupt

    monkeypatch.setattr(HashedFile, "write", die)
    with pytest.raises(KeyboardInterrupt):
        gather_weights(checkpoint)
    monkeypatch.undo()
    assert (checkpoint / f"{WEIGHTS}.part").is_file()
    assert has_shards_alone(checkpoint)
    assert find_corruption(checkpoint, checksums=True) is None
    gather_weights(checkpoint)
    assert not (checkpoint / f"{WEIGHTS}.part").exists()
    assert_same_weights(checkpoint, runs / "gathered" / "checkpoint-2")


def test_two_processes_gather_once(checkpoint, monkeypatch):
    gathered, gather = [], _gather
    monkeypatch.setattr(consolidation, "_gather", lambda *folders: gathered.append(folders) or gather(*folders))
    with (checkpoint / "latest").open("r+") as lock, ThreadPoolExecutor(2) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)  # both have come so far before one goes on
        waiting = [pool.submit(gather_weights, checkpoint) for _ in range(2)]
        assert not any(future.done() for future in waiting)
        fcntl.flock(lock, fcntl.LOCK_UN)
        for future in waiting:
            future.result(timeout=60)
    assert len(gathered) == 1


@pytest.mark.parametrize("small_disk", ["8m"], indirect=True)
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_full_disk_is_a_sentence_and_leaves_the_checkpoint_as_it_was(unfinished, small_disk, when, monkeypatch):
    checkpoint = shutil.copytree(unfinished / "checkpoint-2", small_disk / "checkpoint-2")
    (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free - 40_000))
    if when == "meanwhile":
        monkeypatch.setattr(consolidation, "free_bytes", lambda folder: 2**40)
    with pytest.raises(ValueError, match="GiB are free" if when == "before" else "No space left"):
        gather_weights(checkpoint)
    assert {path.name for path in checkpoint.iterdir()} == {
        path.name for path in (unfinished / "checkpoint-2").iterdir()
    }
    assert find_corruption(checkpoint, checksums=True) is None
    (small_disk / "ballast").unlink()
    monkeypatch.undo()
    gather_weights(checkpoint)


@pytest.mark.parametrize("small_disk", ["8m"], indirect=True)
def test_a_folder_that_cannot_be_written_to_is_sampled_all_the_same(runs, unfinished, small_disk, tmp_path):
    shutil.copytree(unfinished, small_disk / "run")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    texts = sample(small_disk / "run", tmp_path / "texts.jsonl")
    assert texts == sample(died(runs / "gathered", tmp_path / "gathered"), tmp_path / "others.jsonl")
    with whole_weights(small_disk / "run" / "checkpoint-2") as temporary:
        assert_same_weights(temporary, runs / "gathered" / "checkpoint-2")
    assert not temporary.exists()


@pytest.mark.parametrize("what", ["no manifest", "a damaged shard", "a shard more"])
def test_shards_that_are_not_this_projects_are_not_unpickled(checkpoint, tmp_path, what, capsys):
    shard = next((checkpoint / "global_step2").glob("*_model_states.pt"))
    bomb = PickleBomb(tmp_path / "exploded")
    if what == "a shard more":
        bomb.save(shard.with_name("zero_pp_rank_9_mp_rank_00_model_states.pt"))
    elif what == "a damaged shard":
        bomb.save(shard, num_bytes=shard.stat().st_size)
    else:
        bomb.save(shard)
        (checkpoint / MANIFEST).unlink()
    assert exit_code_of(lambda: generate.main(["--model_dir", str(checkpoint)])) == 2
    assert "shards are not read" in capsys.readouterr().err
    assert not bomb.target.exists()
    if what == "no manifest":  # that the bomb is a real one: with a manifest, which is no signature, it is read
        write_manifest(checkpoint, {"best_step": 2}, {})
        with pytest.raises((RuntimeError, KeyError, ValueError)):
            gather_weights(checkpoint)
        assert bomb.target.exists()


def test_sampling_whole_weights_never_imports_deepspeed(runs, tmp_path):
    code = "import generate, sys; generate.main(sys.argv[1:]); sys.exit('deepspeed' in sys.modules)"
    words = ["--model_dir", str(runs / "sharded"), "--num_samples", "1", "--max_new_tokens", "2"]
    subprocess.run([PYTHON, "-c", code, *words], cwd=ROOT, check=True, timeout=120)
