"""Whole runs of train.py, small ones, through Trainer and DeepSpeed's ZeRO-2 with CPU Adam."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler
from conftest import PYTHON, ROOT, assert_same_weights, history, losses, results, run_program, weights
from forked import launch
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

import train
from neoflix.checkpoints.find import find_model, list_checkpoints
from neoflix.data.packing import PackedCollator
from neoflix.data.sources import read_examples
from neoflix.data.split import split_texts
from neoflix.data.tokenizer import load_tokenizer
from neoflix.data.tokens import fill_up, tokenize_texts
from neoflix.model.attention import GPTNeoFastAttention
from neoflix.model.load import load_model
from neoflix.runtime.errors import UserError
from neoflix.runtime.processes import exit_code_of
from neoflix.sampling.sampler import Sampler


def test_run_leaves_what_it_promises(run, model_dir, catalogue, capsys):
    folder = run("run", "--num_train_epochs", "2", "--report_to", "tensorboard")
    figures = results(folder)
    promised = "eval_loss perplexity eval_bits_per_char train_tokens_per_second train_peak_device_bytes"
    assert set(promised.split()) | {"train_peak_host_bytes"} <= set(figures)
    assert figures["perplexity"] == pytest.approx(math.exp(figures["eval_loss"]))
    assert figures["perplexity"] < figures["untouched_perplexity"]
    assert figures["train_tokens_per_second"] > 0
    assert figures["train_peak_host_bytes"] > 100_000_000
    assert list((folder / "runs").rglob("events.out.tfevents.*"))

    # The top of the folder is the best checkpoint, ready for from_pretrained.
    best = min((line["eval_loss"], line["step"]) for line in history(folder) if "eval_loss" in line)
    assert figures["eval_loss"] == pytest.approx(best[0])
    assert figures["saved_step"] == best[1]
    assert_same_weights(folder, folder / f"checkpoint-{best[1]}")
    assert "lm_head.weight" not in weights(folder), "tied weights lie on disk twice"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert tokenizer.bos_token == "<|startoftext|>"
    assert model.generation_config.eos_token_id in (tokenizer.eos_token_id, [tokenizer.eos_token_id])

    # The reported loss is the mean over the held-out texts' tokens, end token counted, beginning not.
    held_out = split_texts(read_examples(catalogue, "description"), 0.1).validation
    total = count = characters = 0
    for _, text, _ in held_out:
        ids = [tokenizer.bos_token_id, *tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        ids = torch.tensor([ids])
        total += model(ids, labels=ids).loss.item() * (ids.numel() - 1)
        count += ids.numel() - 1
        characters += len(text)
    assert figures["eval_loss"] == pytest.approx(total / count, rel=1e-5)
    assert figures["eval_bits_per_char"] == pytest.approx(total / math.log(2) / characters, rel=1e-5)


def test_untouched_model_is_measured_first(run):
    folder = run("run", "--num_train_epochs", "1")
    evaluations = [line for line in history(folder) if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [0, 7]
    assert results(folder)["untouched_perplexity"] == evaluations[0]["eval_perplexity"]


def test_resumed_equals_uninterrupted(run, tmp_path):
    """4 steps, a stop, 4 steps = 8 steps, bit for bit; with dropout, so that random states count."""
    words = ["--max_steps", "8", "--save_strategy", "steps", "--save_steps", "4", "--eval_strategy", "steps"]
    words += ["--eval_steps", "4", "--model_name_or_path", "demo", "--save_total_limit", "5"]
    whole = run("whole", *words)
    resumed = tmp_path / "resumed"
    shutil.copytree(whole, resumed, ignore=shutil.ignore_patterns("checkpoint-8", "all_results.json"))
    assert [path.name for path in list_checkpoints(resumed)] == ["checkpoint-4"]
    run("resumed", *words)
    assert_same_weights(whole / "checkpoint-8", resumed / "checkpoint-8")
    assert losses(resumed) == losses(whole)
    assert results(resumed)["eval_loss"] == results(whole)["eval_loss"]


def test_accumulation_changes_nothing(run):
    words = ["--max_steps", "4", "--eval_strategy", "no", "--save_strategy", "steps"]
    one = run("1x8", *words)
    many = run("8x1", *words, "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "8")
    assert losses(many) == pytest.approx(losses(one), rel=1e-5)
    assert_same_weights(many, one, atol=2e-5, rtol=1e-4)


TOKEN_BATCHES = ["--tokens_per_device_batch", "256", "--gradient_accumulation_steps", "2"]


def test_token_batches_resume_within_an_epoch(run, tmp_path):
    """The same batches as if the run had not stopped. (To rounding: on its first step after loading, DeepSpeed's CPU
    Adam takes powers of its betas where it multiplied before.)"""
    words = [*TOKEN_BATCHES, "--num_train_epochs", "2", "--save_strategy", "steps", "--save_steps", "1"]
    words += ["--save_total_limit", "100", "--eval_strategy", "no", "--metric_for_best_model", "loss"]
    whole = run("whole", *words)
    steps = [int(path.name.partition("-")[2]) for path in list_checkpoints(whole)]
    assert len(steps) == 18
    for stopped in (2, 17):  # in the first epoch and in the last
        part = tmp_path / f"part-{stopped}"
        shutil.copytree(whole / f"checkpoint-{stopped}", part / f"checkpoint-{stopped}")
        shutil.copy(whole / "run.json", part)
        run(part.name, *words)
        assert losses(part) == pytest.approx(losses(whole), rel=1e-6)
        assert_same_weights(whole, part, atol=2e-6, rtol=0)


def test_compiled_model_learns_the_same(run, tmp_path, train_words):
    words = ["--max_steps", "3", "--eval_strategy", "no", "--save_strategy", "steps"]
    plain = run("plain", *words)
    compiled = tmp_path / "compiled"  # in a process of its own: the compiler's warnings are not ours
    launch(0, "train.py", *train_words, "--output_dir", compiled, *words, "--torch_compile", "true")
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-5)


def test_a_batch_from_another_process_is_the_same(run):
    plain = run("plain", "--num_train_epochs", "1")
    assert_same_weights(plain, run("worker", "--num_train_epochs", "1", "--dataloader_num_workers", "1"))


def test_recomputed_activations_change_nothing(run, monkeypatch):
    passes, forward = [], GPTNeoFastAttention.forward
    monkeypatch.setattr(
        GPTNeoFastAttention, "forward", lambda self, *args, **kwargs: passes.append(1) or forward(self, *args, **kwargs)
    )
    plain = run("plain", "--num_train_epochs", "1")
    num_plain = len(passes)
    recomputed = run("recomputed", "--num_train_epochs", "1", "--activation_checkpointing", "true")
    assert len(passes) - num_plain > num_plain, "nothing was recomputed"
    assert_same_weights(plain, recomputed)


def test_run_is_a_plain_torch_loop(run, model_dir, catalogue, tmp_path):
    """Five steps against torch's own AdamW, clipping and cosine schedule on the same texts in the same order."""
    folder = run("run", "--max_steps", "5", "--eval_strategy", "no", "--save_strategy", "steps", "--warmup_steps", "1")
    tokenizer = load_tokenizer(str(model_dir))
    model = load_model(str(model_dir), tokenizer, torch.float32, {})
    texts = split_texts(read_examples(catalogue, "description"), 0.1).train
    dataset = fill_up(tokenize_texts(texts, tokenizer, 256, tmp_path)[0], 8, tokenizer.bos_token_id)
    order = list(SeedableRandomSampler(dataset, generator=torch.Generator(), data_seed=42))

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=1, num_training_steps=5)
    expected = []
    for step in range(5):
        loss = model(**PackedCollator()([dataset[i] for i in order[8 * step : 8 * step + 8]])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert losses(folder) == pytest.approx(expected, rel=1e-5)
    for name, weight in weights(folder).items():
        torch.testing.assert_close(weight, model.state_dict()[name], atol=2e-5, rtol=1e-4)


def test_early_stopping_ends_a_run_that_no_longer_learns(run):
    folder = run("run", "--num_train_epochs", "30", "--learning_rate", "0.05", "--early_stopping_patience", "1")
    evaluated = losses(folder, "eval_loss")
    assert len(evaluated) < 30
    assert evaluated[-1] >= min(evaluated)
    assert results(folder)["eval_loss"] == min(evaluated[1:])


def test_best_and_newest_checkpoints_are_kept(run):
    folder = run("run", "--num_train_epochs", "4", "--save_total_limit", "1", "--learning_rate", "0.02")
    kept = {path.name for path in list_checkpoints(folder)}
    assert f"checkpoint-{results(folder)['saved_step']}" in kept
    assert len(kept) <= 2


def test_finished_run_is_left_alone_and_can_be_lengthened(run, capsys):
    folder = run("run", "--num_train_epochs", "1")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    run("run", "--num_train_epochs", "1")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert "finished" in capsys.readouterr().out
    run("run", "--num_train_epochs", "2")
    assert "Resuming from" in capsys.readouterr().out
    assert results(folder)["global_step"] == 14


def test_no_validation_trains_and_saves_all_the_same(run):
    folder = run("run", "--validation_fraction", "0", "--num_train_epochs", "1")
    assert "eval_loss" not in results(folder)
    assert AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == 512


def test_other_architectures_train_with_padding(run, model_dir, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path / "gpt2"
    shutil.copytree(model_dir, folder, ignore=shutil.ignore_patterns("model*", "config.json", "generation*"))
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=500, n_embd=32, n_layer=2, n_head=2, n_positions=256)).save_pretrained(folder)
    done = run("run", "--model_name_or_path", str(folder), "--num_train_epochs", "1")
    assert results(done)["perplexity"] < results(done)["untouched_perplexity"]


def test_checkpoint_and_generate_agree_on_logits(run):
    folder = run("run", "--num_train_epochs", "1")
    checkpoint = list_checkpoints(folder)[-1]
    ids = torch.tensor([[500, 5, 6, 7, 8, 9] * 5])
    logits = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager").eval()(ids).logits
    for place in (folder, checkpoint):
        sampler = Sampler.load(find_model(str(place)), device="cpu")
        torch.testing.assert_close(sampler.model(ids).logits, logits, atol=1e-4, rtol=1e-4)
    # A run that died before its end: its best checkpoint stands in.
    for path in folder.glob("*.*"):
        path.unlink()
    assert find_model(str(folder)) == checkpoint


# ---- bad input ------------------------------------------------------------------------------------------


def test_another_model_or_tokenizer_does_not_go_on_in_this_run(run, model_dir, catalogue, tmp_path, titles):
    folder = run("run", "--num_train_epochs", "1")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    other_tokenizer = tmp_path / "other_tokenizer"
    shutil.copytree(model_dir, other_tokenizer)
    tokenizer = AutoTokenizer.from_pretrained(other_tokenizer)
    tokenizer.add_tokens(["gentle"])
    tokenizer.save_pretrained(other_tokenizer)
    renamed = tmp_path / "renamed.csv"
    renamed.write_text("description\n" + "\n".join(f'"{text}"' for text in ["One.", "Two.", "Three.", "Four."]))
    more = ["--num_train_epochs", "2"]
    for words, what in (
        (["--model_name_or_path", "demo"], "another model"),
        (["--model_name_or_path", str(other_tokenizer)], "another model"),
        (["--dataset", str(renamed)], "other training texts"),
    ):
        with pytest.raises(ValueError, match=what):
            run("run", *more, *words)
    original = (model_dir / "tokenizer.json").read_bytes()
    try:
        (model_dir / "tokenizer.json").write_bytes((other_tokenizer / "tokenizer.json").read_bytes())
        with pytest.raises(ValueError, match="another tokenizer"):
            run("run", *more)
    finally:
        (model_dir / "tokenizer.json").write_bytes(original)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_unfinished_checkpoint_is_never_resumed(run, capsys):
    folder = run("run", "--max_steps", "2", "--save_strategy", "steps", "--save_steps", "1")
    newest = list_checkpoints(folder)[-1]
    (newest / "trainer_state.json").write_text('{"cut": ')
    with pytest.raises(ValueError, match="complete checkpoint"):
        run("run", "--max_steps", "3", "--resume_from_checkpoint", str(newest))
    run("run", "--max_steps", "3", "--save_strategy", "steps", "--save_steps", "1")
    assert "checkpoint-1" in capsys.readouterr().out


CSV = "title,description\n"
BAD_RUNS = {
    "missing file": ({}, ["--dataset", "none.csv"], "no such file"),
    "a folder": ({}, ["--dataset", "."], "a folder without a .txt file"),
    "an empty file": ({"d.csv": ""}, ["--dataset", "d.csv"], "is empty"),
    "a header only": ({"d.csv": CSV}, ["--dataset", "d.csv"], "no rows"),
    "a wrong column": ({}, ["--text_column", "synopsis"], "it has title, description"),
    "no texts": ({"d.csv": CSV + "a,\nb, \n"}, ["--dataset", "d.csv"], "none of them holds texts"),
    "not UTF-8": ({"d.csv": (CSV + "a,caf\u00e9\n").encode("latin-1")}, ["--dataset", "d.csv"], "save it as UTF-8"),
    "ragged rows": ({"d.csv": CSV + "a,b,c\n"}, ["--dataset", "d.csv"], "line 2 has 3 fields, the header has 2"),
    "an open quote": (
        {"d.csv": CSV + 'a,"b\nc,d\n'},
        ["--dataset", "d.csv"],
        "opens in line 2 is not closed",
    ),
    "broken JSON": ({"d.jsonl": '{"description": "a"}\n{"desc'}, ["--dataset", "d.jsonl"], "line 2"),
    "numbers": ({"d.csv": CSV + "a,1\nb,2\n"}, ["--dataset", "d.csv"], "holds numbers"),
    "one distinct text": ({"d.csv": CSV + "a,One.\nb,one\n"}, ["--dataset", "d.csv"], "all texts are the same"),
    "no model": ({"m/config.json": '{"model_type": "gpt_neo"}'}, ["--model_name_or_path", "m"], "no vocabulary"),
    "no network": ({}, ["--model_name_or_path", "nobody/none"], "hub name needs a network"),
    "DeepSpeed not JSON": ({"ds.json": "{"}, ["--deepspeed", "ds.json"], "not valid JSON"),
    "DeepSpeed misspelt": ({"ds.json": '{"zero_optimisation": {}}'}, ["--deepspeed", "ds.json"], "did you mean"),
    "DeepSpeed stage": (
        {"ds.json": '{"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}'},
        ["--deepspeed", "ds.json"],
        "stage 3 only",
    ),
    "unknown key": ({"r.yaml": "learning_rat: 1"}, ["--config", "r.yaml"], "did you mean 'learning_rate'"),
    "unknown flag": ({}, ["--learning_rat", "1"], "did you mean '--learning_rate'"),
    "no place to write": ({}, ["--output_dir", "/proc/run"], "cannot write in /proc"),
}


@pytest.mark.parametrize("case", BAD_RUNS)
def test_bad_input_is_one_sentence_and_exit_code_2(train_words, tmp_path, monkeypatch, capfd, case):
    files, words, message = BAD_RUNS[case]
    monkeypatch.chdir(tmp_path)
    for name, content in files.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert exit_code_of(lambda: train.main([*train_words, *words])) == 2
    said = capfd.readouterr().err.strip().splitlines()
    assert said[-1].startswith("error: ")
    assert message in said[-1]
    assert not (tmp_path / "run").exists()


def test_model_folder_without_weights(run, model_dir, tmp_path):
    folder = tmp_path / "no_weights"
    shutil.copytree(model_dir, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ValueError, match=r"needs config.json and weights"):
        run("run", "--model_name_or_path", str(folder))


def test_program_says_one_sentence_and_exits_2(train_words, tmp_path):
    output = run_program(PYTHON, "train.py", *train_words, "--text_column", "synopsis", expect=2)
    assert "Traceback" not in output
    assert output.splitlines()[-1].startswith("error: --text_column synopsis: not a column")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"zero_optimization": {"stage": "two"}}, r"'stage' is 'two'; DeepSpeed says: Input should be 0, 1"),
        ({"train_micro_batch_size_per_gpu": 3}, "train_micro_batch_size_per_gpu is 3, but --per_device_train_batch"),
    ],
)
def test_what_deepspeed_refuses_in_its_file_is_one_sentence(run, tmp_path, changes, sentence):
    config = json.loads((ROOT / "ds_configs" / "cpu.json").read_text()) | changes
    (tmp_path / "ds.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"^--deepspeed \S+ds.json: {sentence}"):
        run("run", "--deepspeed", str(tmp_path / "ds.json"))
