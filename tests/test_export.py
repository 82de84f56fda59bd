"""A GPT-Neo in GPT-2's layout writes what it wrote before: by transformers, and by CTranslate2, a real engine."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import ctranslate2
import pytest
import torch
from conftest import PYTHON, ROOT, run_program, tiny_config
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig, GPT2Config, GPT2LMHeadModel, GPTNeoForCausalLM

from neoflix import export
from neoflix.arguments.sampling import SAMPLING_DEFAULTS
from neoflix.checkpoints.find import find_model
from neoflix.checkpoints.names import RUN_FILE
from neoflix.data.tokenizer import load_tokenizer
from neoflix.export import main
from neoflix.model import gpt2
from neoflix.model.load import load_model, load_pretrained
from neoflix.runtime.processes import exit_code_of
from neoflix.sampling.sampler import Sampler

WINDOWS = {  # config -> most tokens
    "a window": ({}, 16),
    "a window as wide as the positions": ({"window_size": 256, "max_position_embeddings": 32}, 32),
    "no local layer": ({"attention_types": [[["global"], 4]]}, 256),
}


@pytest.fixture(scope="module")
def make_run(model_dir, tmp_path_factory):
    """make_run(config's changes) -> a folder as a finished run leaves it.

    `eos_weight` makes the end token's row larger, and texts end sooner.
    """

    def make_run(dtype: torch.dtype = torch.float32, seed: int = 0, eos_weight: float = 1.0, **overrides) -> Path:
        folder = tmp_path_factory.mktemp("run")
        base = shutil.copytree(model_dir, folder / "base")
        torch.manual_seed(seed)
        model = GPTNeoForCausalLM(tiny_config(**overrides))
        model.transformer.wte.weight.data[0] *= eos_weight
        model.save_pretrained(base)
        tokenizer = load_tokenizer(str(base))
        load_model(str(base), tokenizer, dtype, SAMPLING_DEFAULTS).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make_run


@pytest.fixture(scope="module")
def run_dir(make_run):
    return make_run()


def exported(run: Path, *words: str) -> Path:
    out = run / f"gpt2-{len(list(run.iterdir()))}"
    main(["--to", "gpt2", *words, str(run), str(out)])
    return out


@torch.no_grad()
def logits(folder: Path, ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """fp32 [texts, tokens, tokens of the tokenizer]; by eager attention, transformers' own."""
    kind = GPT2LMHeadModel if json.loads((folder / "config.json").read_text())["model_type"] == "gpt2" else None
    kind = kind or GPTNeoForCausalLM
    model, loading = kind.from_pretrained(folder, dtype=dtype, attn_implementation="eager", output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()(ids).logits[..., :502].float()


def draw_ids(num_tokens: int) -> torch.Tensor:
    return torch.randint(502, (4, num_tokens), generator=torch.Generator().manual_seed(1))


# ---- the same model ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", WINDOWS)
def test_logits_are_the_same_for_as_many_tokens_as_it_says(make_run, which):
    overrides, limit = WINDOWS[which]
    run = make_run(**overrides)
    out = exported(run)
    config = GPT2Config.from_pretrained(out)
    assert (config.n_positions, config.n_ctx, config.exported_from["exact_up_to_tokens"]) == (limit, limit, limit)
    ids = draw_ids(limit)
    assert logits(out, ids).std() > 1, "too flat to tell models apart"
    torch.testing.assert_close(logits(out, ids), logits(run, ids), atol=1e-4, rtol=1e-4)
    ours = load_pretrained(str(run), torch.float32).eval()
    torch.testing.assert_close(logits(out, ids), ours(ids).logits[..., :502], atol=1e-4, rtol=1e-4)
    with pytest.raises((IndexError, RuntimeError)):
        logits(out, draw_ids(limit + 1))


def test_beyond_that_it_would_be_another_model(make_run, monkeypatch):
    run = make_run()
    monkeypatch.setattr(gpt2, "context_limit", lambda config: 256)
    out, ids = exported(run), draw_ids(40)
    theirs, ours = logits(out, ids), logits(run, ids)
    torch.testing.assert_close(theirs[:, :16], ours[:, :16], atol=1e-4, rtol=1e-4)
    assert (theirs[:, 16:] - ours[:, 16:]).abs().mean() > 0.1


def test_what_it_cannot_keep_it_says(make_run, capsys):
    out = exported(make_run())
    said = capsys.readouterr().out
    for text in (said, (out / "README.md").read_text()):
        assert "Longer texts would be wrong" in text
        assert "240 positions are left out" in text
    assert "**16 tokens**" in (out / "README.md").read_text()
    no_local_layer, _ = WINDOWS["no local layer"]
    out = exported(make_run(**no_local_layer))
    assert "wrong" not in capsys.readouterr().out + (out / "README.md").read_text()


def test_transformers_writes_the_same_texts(make_run):
    run = make_run(window_size=64)
    model, tokenizer = GPT2LMHeadModel.from_pretrained(exported(run)).eval(), AutoTokenizer.from_pretrained(run)
    prompts = ["A young", "Two brothers", ""]
    settings = {"num_samples": 1, "top_k": 1, "max_new_tokens": 40}
    for sample in Sampler.load(run, device="cpu").sample(prompts, **settings):
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(sample.prompt)["input_ids"]]])
        written = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40)[0]
        assert tokenizer.decode(written[1:]).removesuffix(tokenizer.eos_token).strip() == sample.text


def test_tokenizer_and_settings_come_with_it(run_dir, titles):
    out = exported(run_dir)
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (run_dir, out))
    for text in titles[:20]:
        assert after(text)["input_ids"] == before(text)["input_ids"]
        assert after.decode(after(text)["input_ids"]) == text
    assert after.special_tokens_map == before.special_tokens_map
    assert after.model_max_length == 16
    settings, config = GenerationConfig.from_pretrained(out), GPT2Config.from_pretrained(out)
    assert settings.suppress_tokens == [before.bos_token_id, before.pad_token_id]
    assert (settings.temperature, settings.top_p) == (SAMPLING_DEFAULTS["temperature"], SAMPLING_DEFAULTS["top_p"])
    assert settings.max_new_tokens == 15, "more than there are positions"
    for holder in (settings, config):
        assert (holder.bos_token_id, holder.eos_token_id, holder.pad_token_id) == (500, 0, 501)


def test_a_tied_head_is_written_once_and_another_one_too(run_dir, make_run):
    assert "lm_head.weight" not in load_file(exported(run_dir) / "model.safetensors")
    untied = make_run(tie_word_embeddings=False)
    out = exported(untied)
    weights = load_file(out / "model.safetensors")
    assert not torch.equal(weights["lm_head.weight"], weights["transformer.wte.weight"])
    torch.testing.assert_close(logits(out, draw_ids(16)), logits(untied, draw_ids(16)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("num_heads", "is_exact"), [(2, True), (4, False)])
def test_weights_stay_in_their_dtype_unless_told_otherwise(make_run, num_heads, is_exact, capsys):
    """16 wide heads: scaled by 4, which changes no digit; 8 wide ones by 2.83."""
    run, ids = make_run(torch.bfloat16, num_heads=num_heads), draw_ids(16)
    for words, dtype in ((), torch.bfloat16), (("--dtype", "float32"), torch.float32):
        out = exported(run, *words)
        assert {weight.dtype for weight in load_file(out / "model.safetensors").values()} == {dtype}
        keeps = is_exact or dtype == torch.float32
        difference = (logits(out, ids) - logits(run, ids)).abs().max().item()
        assert (difference < 1e-3) == keeps, difference
        assert difference < 1
        for text in (capsys.readouterr().out, (out / "README.md").read_text()):
            assert ("--dtype float32" in text) != keeps


def test_a_weight_too_large_for_a_dtype_is_refused(make_run):
    run = make_run()
    model = GPTNeoForCausalLM.from_pretrained(run)
    model.transformer.h[0].attn.attention.q_proj.weight.data[0, 0] = 60_000.0
    model.save_pretrained(run)
    with pytest.raises(ValueError, match=r"attn\.c_attn.*float16.*--dtype bfloat16"):
        main(["--to", "gpt2", "--dtype", "float16", str(run), str(run / "out")])
    assert not list(run.glob("out*"))


# ---- an engine --------------------------------------------------------------------------------------------


def test_ctranslate2_writes_the_same_tokens(make_run, titles):
    # Of this model, no two likeliest tokens come closer than 0.0007 on these prompts; rounding moves them by 0.00001.
    run = make_run(window_size=64, seed=1, eos_weight=2.5)
    out = exported(run)
    ctranslate2.converters.TransformersConverter(str(out)).convert(str(run / "ctranslate2"))
    engine = ctranslate2.Generator(str(run / "ctranslate2"), inter_threads=1, intra_threads=1)
    tokenizer = AutoTokenizer.from_pretrained(out)
    prompts = [" ".join(text.split()[: 1 + i % 4]) for i, text in enumerate(titles[:100])]
    assert len(set(prompts)) > 60
    ids = [[tokenizer.bos_token_id, *tokenizer(prompt)["input_ids"]] for prompt in prompts]
    never = GenerationConfig.from_pretrained(out).suppress_tokens
    written = engine.generate_batch(
        [tokenizer.convert_ids_to_tokens(row) for row in ids],
        max_length=32,
        sampling_topk=1,
        include_prompt_in_result=False,
        suppress_sequences=[[token] for token in tokenizer.convert_ids_to_tokens(never)],
    )
    theirs = [result.sequences_ids[0] for result in written]
    assert 20 < sum(len(new) < 32 for new in theirs) < 80, "texts that end, and texts that do not"

    # Token by token: each is what our model finds likeliest after those before it.
    model = load_pretrained(str(run), torch.float32).eval()
    for prompt, new in zip(ids, theirs, strict=True):
        scores = model(torch.tensor([prompt + new])).logits[0, len(prompt) - 1 :]
        scores[:, [*never, *range(len(tokenizer), scores.shape[1])]] = float("-inf")
        expected = scores.argmax(-1).tolist()
        assert new == expected[: len(new)]
        assert len(new) == 32 or expected[len(new)] == tokenizer.eos_token_id

    # And as texts: what generate.py writes.
    samples = Sampler.load(run, device="cpu").sample(prompts, num_samples=1, top_k=1, max_new_tokens=32)
    texts = [tokenizer.decode(prompt[1:] + new).strip() for prompt, new in zip(ids, theirs, strict=True)]
    assert [sample.text for sample in samples] == texts
    with pytest.raises(RuntimeError, match="position"):
        engine.generate_batch([["<|startoftext|>"]], max_length=80, min_length=80)


# ---- whole or not at all ----------------------------------------------------------------------------------


def test_an_interrupted_export_leaves_nothing(make_run, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    run = make_run()
    before = sorted(run.iterdir())
    monkeypatch.setattr(export, "save_settings", interrupt)
    with pytest.raises(KeyboardInterrupt):
        main(["--to", "gpt2", str(run), str(run / "out")])
    assert sorted(run.iterdir()) == before


@pytest.mark.process
def test_a_killed_export_is_no_model(make_run):
    run = make_run()
    code = "import time; from neoflix import export; export.GPT2Config.save_pretrained = lambda *_: time.sleep(300); "
    code += f"export.main(['--to', 'gpt2', {str(run)!r}, {str(run / 'out')!r}])"
    program = subprocess.Popen([PYTHON, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not list(run.glob("out.*.part/README.md")) and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        os.kill(program.pid, signal.SIGKILL)
        program.wait()
    (left,) = run.glob("out*")
    assert (left / "model.safetensors").is_file()
    with pytest.raises(ValueError, match="holds no model"):
        find_model(str(left))
    exported(run)


REFUSALS = {
    "no folder": (["none", "out"], "RUN none: no such folder"),
    "no model": (["unfinished", "out"], "RUN unfinished: holds no model and no complete checkpoint"),
    "another model": (["gpt2", "out"], "RUN gpt2: its model is a gpt2"),
    "no tokenizer": (["bare", "out"], "bare: has no tokenizer"),
    "a folder with something": (["run", "full"], "OUT full: exists already and is not empty"),
    "a file": (["run", "file"], "OUT file: is a file"),
    "no place to write": (["run", "/proc/out"], "OUT /proc/out: cannot be written"),
    "another layout": (["run", "out", "--to", "llama"], "invalid choice: 'llama'"),
    "nothing said": ([], "required: RUN, OUT"),
}


@pytest.fixture
def refused(run_dir, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run_dir, "run", ignore=shutil.ignore_patterns("gpt2*", "base"))
    shutil.copytree("run", "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    shutil.copytree("run", "gpt2")
    (tmp_path / "gpt2" / "config.json").write_text(json.dumps(GPT2Config().to_dict()))
    (tmp_path / "unfinished" / "checkpoint-7.part").mkdir(parents=True)
    (tmp_path / "unfinished" / RUN_FILE).write_text("{}")
    (tmp_path / "full").mkdir()
    for name in ("file", "full/file"):
        (tmp_path / name).write_text("kept")
    return tmp_path


@pytest.mark.parametrize("case", REFUSALS)
def test_what_it_cannot_do_is_one_sentence_and_exit_code_2(refused, case, capfd):
    words, message = REFUSALS[case]
    before = sorted(refused.rglob("*"))
    assert exit_code_of(lambda: main(["--to", "gpt2", *words])) == 2
    (said,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in said
    assert sorted(refused.rglob("*")) == before


@pytest.mark.process
def test_the_program(run_dir, tmp_path):
    words = ("-m", "neoflix.export", "--to", "gpt2", run_dir)
    (tmp_path / "out").mkdir()  # empty: no harm
    assert "GPT-2's layout, float32, texts of up to 16 tokens" in run_program(PYTHON, *words, tmp_path / "out")
    output = run_program(PYTHON, *words, tmp_path / "out", expect=2)
    assert "Traceback" not in output
    assert output.splitlines()[-1].startswith("error: OUT ")
