"""LoRA: adapters alone learn, they alone are saved, and what is loaded is the model that was trained."""

import json
import shutil
from functools import partial

import pytest
import torch
from conftest import PYTHON, ROOT, card, forecast_of, losses, results, run_program
from forked import launch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import train
from neoflix.checkpoints.find import find_model, list_checkpoints
from neoflix.data.packing import PackedCollator
from neoflix.data.tokenizer import load_tokenizer
from neoflix.export import main
from neoflix.model.folder import ADAPTERS_CONFIG_FILE, ADAPTERS_FILE
from neoflix.model.load import load_model, load_pretrained
from neoflix.model.shape import read_shape
from neoflix.planning.remedies import smallest_changes
from neoflix.sampling.sampler import Sampler
from neoflix.training import evaluation

LORA = ["--lora", "true", "--lora_rank", "4", "--learning_rate", "1e-2"]
STEPS = ["--max_steps", "6", "--save_strategy", "steps", "--save_steps", "3", "--eval_strategy", "no"]
IDS = torch.tensor([[500, 5, 6, 7, 8, 9] * 5])


@pytest.fixture(scope="module")
def trained(tmp_path_factory, model_dir, titles):
    """A finished run of two epochs, and the trainer that made it: (folder, trainer, its words)."""
    folder, trainers = tmp_path_factory.mktemp("lora"), []
    lines = [json.dumps({"description": text}) for text in titles[:60]]
    (folder / "titles.jsonl").write_text("\n".join(lines))
    words = ["--model_name_or_path", str(model_dir), "--dataset", str(folder / "titles.jsonl")]
    words += ["--output_dir", str(folder / "run"), "--cache_dir", str(folder / "cache")]
    words += ["--per_device_train_batch_size", "8", "--logging_steps", "1", "--report_to", "none"]
    words += ["--disable_tqdm", "true", "--use_cpu", "true", "--num_train_epochs", "2"]
    words += [*LORA, "--deepspeed", "ds_configs/cpu.json"]
    with pytest.MonkeyPatch.context() as patch:
        build = train.TokenTrainer
        patch.setattr(train, "TokenTrainer", lambda **kwargs: trainers.append(build(**kwargs)) or trainers[0])
        train.main(words)
    return folder / "run", trainers[0], words


def load_base(model_dir, **more):
    return load_model(str(model_dir), load_tokenizer(str(model_dir)), torch.float32, {}, **more)


def test_adapters_alone_learn(trained, model_dir):
    folder, trainer, _ = trained
    evaluated = losses(folder, "eval_loss")
    assert evaluated[-1] < evaluated[0] - 0.2
    before = load_base(model_dir, lora={"rank": 4, "alpha": 8})
    adapted = set()
    for name, weight in trainer.model.named_parameters():
        if weight.requires_grad:
            adapted.add(name.split(".")[-4])
        else:
            torch.testing.assert_close(weight, before.get_parameter(name), atol=0, rtol=0)
    assert adapted == {"q_proj", "k_proj", "v_proj", "out_proj", "c_fc", "c_proj"}
    texts = [{"input_ids": ids, "prompt_length": 1} for ids in ([500, 5, 6], [500, 7])]
    loss = trainer.model(**PackedCollator()(texts)).loss
    assert type(loss.grad_fn.next_functions[0][0]).__name__ == "SummedCrossEntropyBackward"


def test_a_run_holds_adapters_and_little_else(trained, model_dir):
    folder, _, _ = trained
    names = {path.name for path in folder.iterdir() if path.is_file()}
    assert {ADAPTERS_FILE, ADAPTERS_CONFIG_FILE, "tokenizer.json", "generation_config.json"} <= names
    assert not {"model.safetensors", "config.json"} & names
    saved = json.loads((folder / ADAPTERS_CONFIG_FILE).read_text())
    assert (saved["base_model_name_or_path"], saved["r"], saved["lora_alpha"]) == (str(model_dir), 4, 8)
    num_learning = 4 * 4 * (8 * 32 + 2 * (32 + 128))  # layers, rank, widths
    assert sum(weight.numel() for weight in load_file(folder / ADAPTERS_FILE).values()) == num_learning
    for checkpoint in list_checkpoints(folder):
        states = next(checkpoint.glob("global_step*/*model_states.pt"))
        # What learns, and Adam's two moments, in fp32; file and tensor headers
        assert states.stat().st_size < 12 * num_learning + 150_000
        assert not (checkpoint / "model.safetensors").exists()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")  # peft's own loading asks by its old name
def test_what_is_loaded_is_what_was_trained(trained, model_dir):
    """The new tokens' rows, which nobody saved, to the bit; logits as peft's own loading gives them."""
    folder, trainer, _ = trained
    sampler = Sampler.load(find_model(str(folder)), device="cpu")
    trained_rows = trainer.model.get_input_embeddings().weight
    torch.testing.assert_close(sampler.model.get_input_embeddings().weight, trained_rows, atol=0, rtol=0)
    with torch.no_grad():
        direct = PeftModel.from_pretrained(load_base(model_dir), str(folder)).eval()(IDS).logits
        logits = sampler.model(IDS).logits
        torch.testing.assert_close(logits, direct, atol=1e-5, rtol=1e-5)
        assert (logits - load_base(model_dir).eval()(IDS).logits).abs().max() > 0.1, "adapters do nothing"
    assert not any("lora" in name for name, _ in sampler.model.named_modules()), "what samples is a plain GPT-Neo"
    assert sampler.settings()["top_p"] == 0.95
    assert next(sampler.sample("A", max_new_tokens=3)).text.startswith("A")


@pytest.mark.parametrize("layout", ["gpt2", "merged"])
def test_exports_give_the_same_logits(trained, tmp_path, layout):
    folder, _, _ = trained
    main(["--to", layout, str(folder), str(tmp_path / "out")])
    rows = len(load_tokenizer(str(folder)))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert model.config.model_type == {"gpt2": "gpt2", "merged": "gpt_neo"}[layout]
    ids = IDS[:, :16]  # the small model's window
    with torch.no_grad():
        expected = load_pretrained(str(folder), torch.float32).eval()(ids).logits
        torch.testing.assert_close(model(ids).logits[..., :rows], expected[..., :rows], atol=1e-4, rtol=1e-4)
    assert not (tmp_path / "out" / ADAPTERS_FILE).exists()


def test_eval_only_measures_what_the_run_did(trained, monkeypatch):
    folder, _, words = trained
    found = []
    monkeypatch.setattr(evaluation, "_report", lambda *args: found.append(args[0]))
    train.main(["--eval_only", "--model_name_or_path", str(folder), *words[6:8], "--use_cpu", "true"])
    assert found[0]["eval_loss"] == pytest.approx(results(folder)["eval_loss"], rel=1e-5)
    assert found[0]["same_texts_as_run"]


def test_a_run_may_begin_as_another_ones_result(trained, run, model_dir):
    folder, _, _ = trained
    words = ["--model_name_or_path", str(folder), "--max_steps", "2", "--deepspeed", "ds_configs/cpu.json"]
    second = run("second", *LORA, *words)
    assert results(second)["untouched_perplexity"] == pytest.approx(results(folder)["perplexity"], rel=1e-5)
    assert json.loads((second / ADAPTERS_CONFIG_FILE).read_text())["base_model_name_or_path"] == str(folder)
    loaded = Sampler.load(second, device="cpu").model
    with torch.no_grad():
        assert (loaded(IDS).logits - load_pretrained(str(folder), torch.float32).eval()(IDS).logits).abs().max() > 0.01


def test_other_settings_are_another_run(trained):
    *_, words = trained
    start = words.index("--lora")
    without = words[:start] + words[start + 4 :]  # not --lora_rank 4 either
    for other in ([*words, "--lora_rank", "8"], [*words, "--lora_alpha", "4"], without):
        with pytest.raises(ValueError, match="another lora"):
            train.main([*other, "--num_train_epochs", "3"])


# ---- through DeepSpeed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deepspeed", ["ds_configs/no_offload.json", "ds_configs/zero3_offload.json"])
def test_resumed_equals_uninterrupted(run, tmp_path, deepspeed):
    """Bit for bit; and a stage that keeps shares of weights saves adapters as whole as any."""
    words = [*LORA, *STEPS, "--deepspeed", deepspeed]
    whole = run("whole", *words)
    resumed = tmp_path / "resumed"
    shutil.copytree(whole, resumed, ignore=shutil.ignore_patterns("checkpoint-6", "all_results.json"))
    run("resumed", *words)
    assert losses(resumed) == losses(whole)
    ours, theirs = (load_file(folder / ADAPTERS_FILE) for folder in (resumed, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(weight.numel() for weight in ours.values())


def test_two_processes_go_on_with_what_one_began(run, train_words, tmp_path):
    """ZeRO-2: the optimizer of adapters alone is divided anew; sums in another order apart, it is the same run."""
    words = [*LORA, *STEPS, "--deepspeed", "ds_configs/no_offload.json"]
    whole = run("whole", *words)
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy, ignore=shutil.ignore_patterns("checkpoint-6", "all_results.json"))
    output = launch(2, "train.py", *train_words, "--output_dir", copy, *words)
    assert "checkpoint-3 was saved by 1 process(es); converting" in output
    assert losses(copy) == pytest.approx(losses(whole), abs=1e-6)
    ours, theirs = (load_file(folder / ADAPTERS_FILE) for folder in (copy, whole))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=1e-4)


def test_recomputed_activations_and_accumulation_change_nothing(run):
    words = [*LORA, *STEPS, "--deepspeed", "ds_configs/cpu.json"]
    plain = losses(run("plain", *words))
    recomputed = run("recomputed", *words, "--activation_checkpointing", "true")
    assert losses(recomputed) == pytest.approx(plain, rel=1e-6)
    many = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4"]
    assert losses(run("accumulated", *words, *many)) == pytest.approx(plain, rel=1e-5)


# ---- bad input ----------------------------------------------------------------------------------------------------


@pytest.fixture
def adapters(trained, tmp_path):
    """A copy of the run's model alone, to spoil."""
    folder = tmp_path / "adapters"
    folder.mkdir()
    for path in trained[0].iterdir():
        if path.is_file() and path.name not in ("run.json", "all_results.json"):
            shutil.copy(path, folder)
    return folder


def rewrite(folder, **values) -> None:
    config = json.loads((folder / ADAPTERS_CONFIG_FILE).read_text())
    (folder / ADAPTERS_CONFIG_FILE).write_text(json.dumps(config | values))


def test_adapters_that_cannot_be_used_are_one_sentence(adapters, model_dir):
    load = partial(Sampler.load, adapters, device="cpu")
    load()
    for values, message in (
        ({"base_model_name_or_path": "/gone"}, "adapters.*/gone"),
        ({"peft_type": "IA3"}, "LoRA.*IA3"),
        ({"megatron_config": {}, "megatron_core": "os", "peft_type": None}, "LoRA.*None"),
        ({"r": 8}, "do not fit"),
        ({"target_modules": ["q_proj"]}, "do not fit"),
    ):
        before = (adapters / ADAPTERS_CONFIG_FILE).read_text()
        rewrite(adapters, **values)
        with pytest.raises(ValueError, match=message):
            load()
        (adapters / ADAPTERS_CONFIG_FILE).write_text(before)
    weights = load_file(adapters / ADAPTERS_FILE)
    weights.pop(next(iter(weights)))
    save_file(weights, adapters / ADAPTERS_FILE)
    with pytest.raises(ValueError, match="do not fit"):
        load()
    (adapters / ADAPTERS_FILE).write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="cannot be read"):
        load()
    (adapters / ADAPTERS_FILE).rename(adapters / "adapter_model.bin")  # a pickle, by its name: no model at all
    with pytest.raises(ValueError, match="holds no model"):
        find_model(str(adapters))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model_name_or_path", "demo"], "--lora true: .*'demo'"),
        (["--lora_rank", "0"], "--lora_rank 0: must be above 0"),
        (["--lora_alpha", "-1"], "--lora_alpha -1: must be above 0"),
    ],
)
def test_flags_that_mean_nothing(train_words, words, message):
    with pytest.raises(ValueError, match=message):
        train.main([*train_words, "--lora", "true", *words])


# ---- the plan -----------------------------------------------------------------------------------------------------


def test_forecast_counts_adapters_as_they_are(model_dir):
    shape = read_shape(str(model_dir))
    model = load_base(model_dir, lora={"rank": 4, "alpha": 8})
    assert 4 * shape.adapted == sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


@pytest.mark.parametrize(("size", "gib", "host"), [("2.7B", 24, 24), ("2.7B", 24, 16), ("1.3B", 12, 16)])
def test_short_host_memory_is_answered_with_lora(size, gib, host):
    whole = forecast_of(size, card(gib, host))
    assert [what for what, *_ in whole.over_budget()] == ["host memory"]
    changes = dict(smallest_changes(whole))
    assert "--lora true" in changes
    adapted = changes["--lora true"]
    assert adapted.host_bytes < 0.4 * whole.host_bytes
    assert adapted.device_bytes < whole.device_bytes
    assert adapted.checkpoint_bytes < 0.02 * whole.checkpoint_bytes
    assert adapted.flops < 0.7 * whole.flops


@pytest.mark.process
def test_recipe_fits_the_machine_it_is_for():
    words = ["--config", str(ROOT / "recipes" / "gpt-neo-2.7b-lora.yaml"), "--plan_device_memory", "24GiB"]
    output = run_program(PYTHON, "train.py", "--plan", *words, "--plan_host_memory", "16GiB")
    assert "million trainable (LoRA)" in output
