"""`train.py --plan`, and a run that is refused by its plan."""

import pytest
from conftest import GIB, PYTHON, run_program, tiny_config
from forked import launch

import train
from neoflix.planning.plan_run import parse_bytes
from neoflix.runtime.errors import UserError


def test_bad_fit_is_refused_before_weights_are_read(tmp_path, catalogue, capsys):
    """A model that no machine holds; its folder has no weights to read."""
    config = tiny_config(
        num_layers=1000, hidden_size=16384, num_heads=128, attention_types=[[["global", "local"], 500]]
    )
    config.save_pretrained(tmp_path / "huge")
    words = ["--model_name_or_path", str(tmp_path / "huge"), "--dataset", str(catalogue), "--use_cpu", "true"]
    with pytest.raises(ValueError, match="GiB of host memory") as caught:
        train.main([*words, "--output_dir", str(tmp_path / "run")])
    assert "--plan_must_fit false" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_missing_model_is_a_sentence(tmp_path):
    (tmp_path / "model").mkdir()
    for words in (["--plan"], ["--deepspeed", "auto"]):
        with pytest.raises(ValueError, match=r"no config\.json"):
            train.main([*words, "--model_name_or_path", str(tmp_path / "model"), "--output_dir", str(tmp_path / "run")])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--plan", "--plan_device_memory", "much"], "must be a size"),
        (["--plan_device_memory", "24GiB"], "--plan_device_memory 24GiB: .* --plan"),
        (["--tokens_per_device_batch", "many"], "a number of tokens, or auto"),
    ],
)
def test_flags_of_the_plan_are_checked(words, message, train_words):
    with pytest.raises(ValueError, match=message):
        train.main([*train_words, *words])


def test_sizes():
    assert parse_bytes("24GiB", "x") == 24 * GIB == parse_bytes("24", "x") == parse_bytes("24 G", "x")
    assert parse_bytes("24GB", "x") == 24e9
    assert parse_bytes("512 MiB", "x") == GIB / 2


@pytest.mark.process
def test_plan_answers_without_torch(tmp_path):
    tiny_config(
        vocab_size=50257, hidden_size=2560, num_layers=32, num_heads=20, attention_types=[[["global", "local"], 16]]
    ).save_pretrained(tmp_path / "model")
    words = ["--plan", "--model_name_or_path", str(tmp_path / "model"), "--plan_host_memory", "64GiB"]
    words += ["--output_dir", str(tmp_path / "run")]
    program = [PYTHON, "-X", "importtime", "train.py", *words]
    output = run_program(*program, "--plan_device_memory", "24GiB")
    assert "| torch\n" not in output
    for part in ("weights", "activations", "optimizer, pinned", "total", "steps", "3 checkpoints"):
        assert part in output
    assert "error: " in run_program(*program, "--plan_device_memory", "12GiB", expect=2)


@pytest.mark.process
def test_both_ways_to_a_plan_give_the_same(train_words, capsys):
    """Hugging Face's other flags take torch, and change nothing."""
    words = [*train_words[:-2], "--plan", "--plan_device_memory", "24GiB", "--plan_host_memory", "64GiB"]
    quick = run_program(PYTHON, "train.py", *words)
    train.main([*words, "--adam_beta2", "0.99"])
    assert quick.strip() in capsys.readouterr().out


@pytest.mark.process
def test_plan_false_trains(train_words, tmp_path):
    words = [*train_words, "--plan", "false", "--max_steps", "1", "--deepspeed", "ds_configs/cpu.json"]
    launch(0, "train.py", *words)
    assert (tmp_path / "run" / "all_results.json").is_file()
    assert "error: " in launch(0, "train.py", "--plan", "--dataset", expect=2)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--dataset"], "--dataset"),
        (["--max_steps", "0"], "--max_steps 0"),
        (["--lr_scheduler_type", "foo"], "--lr_scheduler_type foo"),
        (["--adam_beta3", "0.9"], "--adam_beta3"),
        (["--deepspeed", '{"gradient_clipping": 0.5}'], "gradient_clipping is 0.5"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_wrong_flags_are_refused_alike_with_and_without_a_plan(words, part, train_words):
    messages = []
    for more in ([], ["--plan"]):
        with pytest.raises(UserError) as error:
            train.main([*train_words, *more, *words])
        assert part in str(error.value)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
