"""Sampling draws from the right distribution, from a stream for each text, and writes what it promises."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import PYTHON, ROOT
from transformers import AutoModelForCausalLM, GenerationConfig

import generate
from neoflix.arguments.sampling import SAMPLING_DEFAULTS
from neoflix.data.tokenizer import load_tokenizer
from neoflix.model.load import load_model
from neoflix.runtime.console import printable
from neoflix.sampling.decoder import Text
from neoflix.sampling.draw import Draw, stream_keys
from neoflix.sampling.sampler import Sampler


@pytest.fixture(scope="module")
def run_dir(model_dir, tmp_path_factory):
    """A folder as a finished run leaves it."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = load_tokenizer(str(model_dir))
    torch.manual_seed(0)
    load_model(str(model_dir), tokenizer, torch.float32, SAMPLING_DEFAULTS | {"max_new_tokens": 24}).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sampler(run_dir):
    return Sampler.load(run_dir, device="cpu")


def draws(seed: int, num: int, logits: torch.Tensor, step: int = 0, **settings) -> torch.Tensor:
    draw = Draw(**({"temperature": 1.0, "top_k": 0, "top_p": 1.0} | settings))
    tokens, _ = draw(logits.expand(num, -1), stream_keys(seed, list(range(num))), torch.full((num,), step))
    return tokens


def grow(sampler, prompts: list[list[int]], seed: int = 1, **settings) -> list[list[int]]:
    """Token ids that follow each prompt, all texts side by side."""
    settings = sampler.settings(**settings)
    grown = [Text(i, prompt, settings["max_new_tokens"]) for i, prompt in enumerate(prompts)]
    for _ in sampler._decoder(grown, seed, len(grown), settings).grow(grown):
        pass
    return [text.new_ids for text in grown]


@pytest.mark.parametrize("step", [0, 1, 57])
def test_noise_draws_from_the_softmax(step):
    """Chi-square over 7 degrees of freedom; 24.3 is exceeded once in 1,000 by chance. The seed is fixed."""
    logits = torch.tensor([3.0, 2.5, 2.0, 1.0, 0.5, 0.0, -1.0, -2.0])
    num = 40_000
    seen = torch.bincount(draws(11, num, logits, step), minlength=8)
    expected = logits.softmax(-1) * num
    assert ((seen - expected) ** 2 / expected).sum() < 24.3


def test_streams_steps_and_seeds_are_unrelated():
    flat = torch.zeros(1000)
    by_seed = [draws(seed, 500, flat, step) for seed in (1, 2) for step in (0, 1)]
    for i, one in enumerate(by_seed):
        assert one.unique().numel() > 350  # 500 draws of 1,000 give 394 different ones on average
        for other in by_seed[i + 1 :]:
            assert (one == other).sum() < 10


def test_impossible_tokens_stay_impossible():
    logits = torch.full((50,), float("-inf"))
    logits[7] = 0.0
    assert (draws(3, 200, logits) == 7).all()


def texts(sampler, **options):
    return [sample.text for sample in sampler.sample(seed=5, max_new_tokens=20, **options)]


def test_text_i_is_the_same_in_any_batch(sampler):
    alone = texts(sampler, num_samples=7, batch_size=1)
    assert texts(sampler, num_samples=7, batch_size=7) == alone
    assert texts(sampler, num_samples=7, batch_size=3) == alone
    assert texts(sampler, num_samples=4, batch_size=4) == alone[:4]
    assert len(set(alone)) == 7


def test_prompts_of_unlike_length_share_a_batch(sampler):
    prompts = ["A", "When the harbour freezes over, a retired pilot of great age", "Two brothers"]
    together = texts(sampler, prompts=prompts, num_samples=2, batch_size=6)
    assert together == texts(sampler, prompts=prompts, num_samples=2, batch_size=1)
    for text, prompt in zip(together[::2], prompts, strict=True):
        assert text.startswith(prompt)


def test_no_filter_is_the_models_own_distribution(sampler, run_dir):
    """First tokens of many texts against the softmax of a plain transformers model."""
    model = AutoModelForCausalLM.from_pretrained(run_dir).eval()
    bos = torch.tensor([[sampler.tokenizer.bos_token_id]])
    logits = model(bos).logits[0, -1]
    logits[sampler.never_sampled] = float("-inf")
    top = logits.topk(5).indices
    probabilities = logits.softmax(-1)
    num = 4000
    rows = grow(sampler, [[int(bos)]] * num, 9, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=1)
    first = torch.tensor([row[0] if row else sampler.tokenizer.eos_token_id for row in rows])
    for token in top.tolist():
        p = probabilities[token].item()
        assert abs((first == token).float().mean().item() - p) < 4.5 * (p * (1 - p) / num) ** 0.5


def test_settings_bite(sampler):
    greedy = texts(sampler, num_samples=3, top_k=1)
    assert len(set(greedy)) == 1
    assert len(set(texts(sampler, num_samples=3, top_p=1e-6))) == 1
    assert len(set(texts(sampler, num_samples=3, temperature=1e-4))) == 1
    assert texts(sampler, num_samples=3, repetition_penalty=1.5) != texts(sampler, num_samples=3)


def test_greedy_is_transformers_greedy(sampler, run_dir):
    model = AutoModelForCausalLM.from_pretrained(run_dir, attn_implementation="eager").eval()
    ids = [sampler.tokenizer.bos_token_id, *sampler.tokenizer("Two brothers")["input_ids"]]
    config = GenerationConfig(
        do_sample=False, max_new_tokens=30, eos_token_id=0, pad_token_id=501, suppress_tokens=sampler.never_sampled
    )
    theirs = model.generate(torch.tensor([ids]), generation_config=config)[0, len(ids) :].tolist()
    assert grow(sampler, [ids], top_k=1, max_new_tokens=30) == [theirs]


def test_saved_settings_hold_unless_overruled(sampler):
    assert sampler.settings()["max_new_tokens"] == 24
    assert sampler.settings()["temperature"] == SAMPLING_DEFAULTS["temperature"]
    assert sampler.settings(temperature=1.5, top_k=None)["temperature"] == 1.5


def test_rows_without_a_token_are_never_sampled(sampler):
    """At this temperature every row is as likely as any other: 3,000 draws would hit the 11 rows without a text."""
    rows = grow(sampler, [[500]] * 100, temperature=1e4, top_p=1.0, max_new_tokens=40)
    drawn = {token for row in rows for token in row}
    assert sampler.never_sampled == list(range(500, 512))
    assert len(drawn) > 300
    assert not drawn & set(sampler.never_sampled)


def test_window_is_never_passed(sampler):
    long = next(sampler.sample(max_new_tokens=5000, num_samples=1, prompts=["word " * 40]))
    assert long.num_tokens + len(sampler.tokenizer(long.prompt)["input_ids"]) + 1 <= 256
    with pytest.raises(ValueError, match=r"--prompt 'word word .*\[\.\.\.\]': [0-9]+ tokens leave no room"):
        sampler.sample(prompts=["A", "word " * 300])
    with pytest.raises(ValueError, match=r"--prompt 'A .udcff': is not UTF-8"):  # a shell that speaks Latin-1
        sampler.sample(prompts=["A \udcff"])


@pytest.mark.parametrize("bad", [{"temperature": 0}, {"top_p": 0.0}, {"top_p": 1.2}, {"top_k": -1}, {"num_samples": 0}])
def test_settings_that_mean_nothing(sampler, bad):
    ((name, value),) = bad.items()
    with pytest.raises(ValueError, match=f"{name}={value}: must be"):
        sampler.sample(**bad)
    with pytest.raises(TypeError, match="'temprature' is no sampling setting; there are temperature, "):
        sampler.sample(temprature=1.0)


def test_one_prompt_needs_no_list(sampler):
    assert texts(sampler, prompts="Two brothers") == texts(sampler, prompts=["Two brothers"])


def test_pretrained_model_as_it_came_can_write(model_dir):
    sampler = Sampler.load(model_dir, device="cpu")
    assert next(sampler.sample(max_new_tokens=5)).num_tokens <= 5


# ---- generate.py ----------------------------------------------------------------------------------------


def test_jsonl_is_what_was_promised(run_dir, tmp_path):
    output = tmp_path / "samples.jsonl"
    words = ["--model_dir", str(run_dir), "--num_samples", "5", "--seed", "3", "--prompt", "A young "]
    generate.main([*words, "--output", str(output), "--max_new_tokens", "40"])
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 5
    for row in rows:
        assert list(row) == ["text", "prompt", "seed", "num_tokens", "finish_reason"]
        assert (row["prompt"], row["seed"]) == ("A young", 3)
        assert row["text"].startswith("A young")
        assert row["finish_reason"] == ("length" if row["num_tokens"] == 40 else "eos")
    before = output.read_bytes()
    with pytest.raises(ValueError, match="exists already"):
        generate.main([*words, "--output", str(output)])
    assert output.read_bytes() == before


def test_prompts_from_a_file(run_dir, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("A young\n\nTwo brothers\n")
    generate.main(["--model_dir", str(run_dir), "--num_samples", "2", "--prompt", str(prompts)])
    lines = capsys.readouterr().out.splitlines()
    assert [line[5:].startswith(p) for line, p in zip(lines, ["A", "A", "T", "T"], strict=True)] == [True] * 4
    prompts.write_text("\n \n")
    with pytest.raises(ValueError, match="no line with text"):
        generate.main(["--model_dir", str(run_dir), "--prompt", str(prompts)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model_dir", "none"], "no such folder"),
        (["--model_dir", "{empty}"], "no complete checkpoint"),
        (["--model_dir", "{run}", "--output", "{empty}/none/x.jsonl"], "cannot be written"),
        (["--model_dir", "{run}", "--prompt", "word " * 300, "--output", "{empty}/x.jsonl"], "leave no room"),
    ],
)
def test_bad_words_write_nothing(run_dir, tmp_path, words, message):
    words = [word.replace("{empty}", str(tmp_path)).replace("{run}", str(run_dir)) for word in words]
    with pytest.raises(ValueError, match=message):
        generate.main(words)
    assert list(tmp_path.iterdir()) == []


def test_control_tokens_in_a_prompt_are_text(sampler):
    """Typed by a user, the end token's name is thirteen characters."""
    ids = sampler._encode("A <|endoftext|> <|startoftext|>")
    assert ids[0] == sampler.tokenizer.bos_token_id
    assert not {sampler.tokenizer.eos_token_id, sampler.tokenizer.bos_token_id} & set(ids[1:])
    assert sampler.tokenizer.decode(ids[1:]) == "A <|endoftext|> <|startoftext|>"


def test_texts_after_the_first_ones(sampler):
    whole = texts(sampler, num_samples=9, batch_size=4)
    assert texts(sampler, num_samples=9, batch_size=4, skip=5) == whole[5:]
    assert texts(sampler, num_samples=9, batch_size=4, skip=9) == []
    assert texts(sampler, num_samples=4, batch_size=4, first_index=5) == whole[5:]


def test_stream_prints_each_text_as_it_is_written(run_dir, tmp_path, capsys):
    words = ["--model_dir", str(run_dir), "--num_samples", "3", "--seed", "3", "--prompt", "A young"]
    generate.main([*words, "--output", str(tmp_path / "x.jsonl")])
    capsys.readouterr()
    rows = [json.loads(line)["text"] for line in (tmp_path / "x.jsonl").read_text(encoding="utf-8").splitlines()]
    generate.main([*words, "--stream"])
    printed = capsys.readouterr().out
    assert "".join(printed.split()) == "".join(printable("".join(rows)).split())


@pytest.fixture
def long_job(run_dir, tmp_path) -> tuple[list[str], Path]:
    """Words of a command that writes 600 texts, and its file."""
    output = tmp_path / "samples.jsonl"
    words = [PYTHON, "generate.py", "--model_dir", str(run_dir), "--num_samples", "600", "--max_new_tokens", "60"]
    return [*words, "--temperature", "1.0", "--output", str(output)], output


def test_killed_and_started_again(long_job):
    """The same file as if never killed, half a line and all; and no other job goes on with it."""
    words, output = long_job
    program = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.DEVNULL)
    while not output.exists() or output.read_bytes().count(b"\n") < 40:
        assert program.poll() is None
        time.sleep(0.05)
    program.send_signal(signal.SIGKILL)
    program.wait()
    written = output.read_bytes()
    assert written.count(b"\n") < 600
    output.write_bytes(written[: written.rfind(b"\n") + 1] + b'{"text": "A yo')

    arguments = words[2:]
    with pytest.raises(ValueError, match=r"was begun with other temperature \(1.0, now 0.9\)"):
        generate.main([*arguments, "--temperature", "0.9"])
    with pytest.raises(ValueError, match="was begun with other prompts"):
        generate.main([*arguments, "--prompt", "Two"])
    generate.main(arguments)
    again = output.read_bytes()
    output.unlink()
    generate.main(arguments)
    assert again == output.read_bytes()
    assert again.startswith(written[: written.rfind(b"\n") + 1])
    assert again.count(b"\n") == 600
    assert sorted(path.name for path in output.parent.iterdir()) == [output.name]
    with pytest.raises(ValueError, match="exists already"):
        generate.main(arguments)


def test_reader_that_has_seen_enough(long_job):
    """`generate.py | head -1` ends by itself, quietly."""
    words, _ = long_job
    program = subprocess.Popen(words[:-2], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert program.stdout.readline().startswith("  1. ")
    program.stdout.close()
    complaints = program.stderr.read()
    assert program.wait(120) == 128 + signal.SIGPIPE
    assert "Error" not in complaints
    program.stderr.close()


def test_model_without_a_tokenizer(run_dir, tmp_path):
    """transformers would build an empty one, and every text would be empty."""
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((run_dir / name).read_bytes())
    with pytest.raises(ValueError, match=rf"--model_dir {tmp_path}: holds a model but no tokenizer"):
        generate.main(["--model_dir", str(tmp_path)])
