"""Models exported as GGUF, run by llama.cpp: a GPT-Neo, trained for seconds, and Llamas.

llama.cpp's kernels round differently (its GELU is a table in fp16). So the likeliest tokens may differ where two are
nearly as likely.
"""

import json
import math
import random
import re
import shutil
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
import torch
from conftest import OTHERS, ROOT, tiny_config
from gguf import GGUFReader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from neoflix.arguments.sampling import SAMPLING_DEFAULTS
from neoflix.checkpoints.names import RESULTS_FILE, RUN_FILE
from neoflix.data.packing import PackedCollator
from neoflix.data.tokenizer import load_tokenizer
from neoflix.export import main
from neoflix.exporting import gguf_file
from neoflix.model.load import load_model, load_pretrained
from neoflix.model.lora import collect_adapters, save_adapters
from neoflix.runtime.processes import exit_code_of
from neoflix.sampling.sampler import Sampler

CONTEXT = 64
NEAR_TIE = 0.005  # nats between our likeliest token and llama.cpp's
NUM_HELD_OUT = 40
TEXTS = [
    "Two  spaces,\nnew\n\nlines,\ta tab and the end   ",
    "  Before the first word",
    "Ünïcödé — “quotes”, 日本語, 🙂, e\u0301, \u00a0 and \u2028",
    "don't I'LL we've 1234567 3.14 a1b2 2nd!?... (x)",
    "<|pad|> and <|endoftext|> are words here",
]


@pytest.fixture
def engine():
    """engine(file) loads a GGUF file into llama.cpp."""
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
    from llama_engine import LlamaEngine

    with ExitStack() as opened:
        yield lambda file, **more: opened.enter_context(closing(LlamaEngine(file, **more)))


def write_run(folder: Path, model_dir: Path, model, dtype: torch.dtype = torch.float32, **settings) -> Path:
    """A model as a finished run leaves it."""
    for file in model_dir.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    model.save_pretrained(folder)
    tokenizer = load_tokenizer(str(folder))
    load_model(str(folder), tokenizer, dtype, SAMPLING_DEFAULTS | settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained_run(model_dir, titles, tmp_path_factory) -> Path:
    """A GPT-Neo with a window, trained on all titles but the held-out ones."""
    torch.manual_seed(0)
    config = tiny_config(hidden_size=64, window_size=CONTEXT, initializer_range=0.02)
    folder = write_run(tmp_path_factory.mktemp("trained"), model_dir, GPTNeoForCausalLM(config), top_k=50)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = load_pretrained(str(folder), torch.float32).train()
    texts = [{"input_ids": encode(text, tokenizer), "prompt_length": 1} for text in titles[:-NUM_HELD_OUT]]
    optimizer, draw = torch.optim.AdamW(model.parameters(), lr=5e-3), random.Random(0)
    for _ in range(80):
        model(**PackedCollator()(draw.sample(texts, 8))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


def encode(text: str, tokenizer) -> list[int]:
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id][:CONTEXT]


def exported(run: Path, *words: str) -> Path:
    out = run / f"{len(list(run.iterdir()))}.gguf"
    main(["--to", "gguf", *words, str(run), str(out)])
    return out


@torch.no_grad()
def compare(file: Path, run: Path, texts: list[str], engine, **more) -> tuple[float, float, float]:
    """(share of places with the same likeliest token, the largest gap where it differs, llama.cpp's perplexity relative
    to ours)"""
    llama_cpp, tokenizer = engine(file, **more), AutoTokenizer.from_pretrained(run)
    model = load_pretrained(str(run), torch.float32).eval()
    gaps, difference, num_places = [], 0.0, 0
    for text in texts:
        ids = encode(text, tokenizer)
        ours = model(torch.tensor([ids])).logits[0, :-1, : len(tokenizer)].log_softmax(-1)
        places = llama_cpp.score(ids, tokenizer)
        likeliest = [token for token, _ in places]
        gaps += (ours.amax(-1) - ours[range(len(places)), likeliest]).tolist()
        difference += ours[range(len(places)), ids[1:]].sum().item() - sum(theirs for _, theirs in places)
        num_places += len(places)
    assert num_places > 500
    return sum(gap == 0 for gap in gaps) / num_places, max(gaps), math.exp(difference / num_places)


# ---- a GPT-Neo in llama.cpp -------------------------------------------------------------------------------


@pytest.mark.process  # trained_run trains
def test_llama_cpp_finds_the_same_tokens_likely(trained_run, titles, engine):
    file = exported(trained_run)
    same, largest_gap, perplexity = compare(file, trained_run, titles[-NUM_HELD_OUT:], engine)
    assert same >= 0.999
    assert largest_gap < NEAR_TIE
    assert perplexity == pytest.approx(1, abs=1e-3)
    same, largest_gap, perplexity = compare(file, trained_run, titles[-10:], engine, is_exact=False)
    assert same > 0.995
    assert perplexity == pytest.approx(1, abs=1e-3)


@pytest.mark.process
def test_llama_cpp_writes_the_same_texts(trained_run, titles, engine):
    llama_cpp = engine(exported(trained_run))
    prompts = [" ".join(text.split()[: 1 + i % 4]) for i, text in enumerate(titles[:100])]
    samples = Sampler.load(trained_run, device="cpu").sample(prompts, top_k=1, max_new_tokens=24)
    theirs = [(prompt + llama_cpp.write(prompt, 24)).strip() for prompt in prompts]
    ours = [sample.text for sample in samples]
    assert sum(text == other for text, other in zip(ours, theirs, strict=True)) >= 95
    assert len(set(ours)) > 60


@pytest.mark.process
def test_tokens_are_the_same(trained_run, titles, engine):
    llama_cpp, tokenizer = engine(exported(trained_run)), AutoTokenizer.from_pretrained(trained_run)
    for text in [*titles, *TEXTS]:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert llama_cpp.tokenize(text) == [tokenizer.bos_token_id, *ids]
        assert llama_cpp.ask("/detokenize", tokens=ids)["content"] == text


@pytest.mark.process
@pytest.mark.parametrize(
    ("dtype", "bytes_per_weight", "change"), [("float16", 2, 1e-4), ("bfloat16", 2, 2e-3), ("q8_0", 34 / 32, 2e-3)]
)
def test_fewer_bits(trained_run, titles, engine, dtype, bytes_per_weight, change):
    file = exported(trained_run, "--dtype", dtype)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(file).tensors}
    assert kinds["blk.0.attn_qkv.weight"] == {"float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}[dtype]
    assert kinds["blk.0.attn_qkv.bias"] == kinds["output_norm.weight"] == kinds["position_embd.weight"] == "F32"
    matrices = sum(t.n_elements for t in GGUFReader(file).tensors if t.tensor_type.name != "F32")
    assert (
        sum(t.n_bytes for t in GGUFReader(file).tensors if t.tensor_type.name != "F32") == matrices * bytes_per_weight
    )
    same, _, perplexity = compare(file, trained_run, titles[-10:], engine)
    assert same > 0.97
    assert perplexity == pytest.approx(1, abs=change)


@pytest.mark.process
def test_no_text_exceeds_the_window(trained_run, engine):
    llama_cpp = engine(exported(trained_run), context=4096)
    answer = llama_cpp.ask("/completion", prompt=[500] + [40] * 9, n_predict=200, ignore_eos=True)
    assert answer["tokens_evaluated"] + answer["tokens_predicted"] == CONTEXT
    assert "exceed_context_size" in json.dumps(llama_cpp.ask("/completion", prompt=[500] + [40] * CONTEXT))


@pytest.mark.process
def test_it_samples_as_the_run_says(trained_run, engine):
    """temperature 0.8 before top_k 50 and top_p 0.95; llama.cpp's own order and defaults would differ."""
    llama_cpp, tokenizer = engine(exported(trained_run)), AutoTokenizer.from_pretrained(trained_run)
    answer = llama_cpp.ask("/completion", prompt="A young", n_predict=1, n_probs=502, post_sampling_probs=True)
    theirs = {entry["id"]: entry["prob"] for entry in answer["completion_probabilities"][0]["top_probs"]}
    theirs = {token: share for token, share in theirs.items() if share > 0}
    ids = torch.tensor([encode("A young", tokenizer)[:-1]])
    shares = (load_pretrained(str(trained_run), torch.float32).eval()(ids).logits[0, -1] / 0.8).softmax(-1)
    best = shares.topk(50).values / shares.topk(50).values.sum()
    kept = best[best.cumsum(0) - best < 0.95]
    assert len(theirs) == len(kept) > 5
    expected = (kept / kept.sum()).tolist()
    assert sorted(theirs.values(), reverse=True) == pytest.approx(expected, abs=1e-4)


@pytest.mark.process
def test_the_documents_example(trained_run, engine, tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "export.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "xllamacpp" in block]
    shutil.copy(exported(trained_run), tmp_path / "my-model.gguf")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    # Threads that wait for each other on a busy machine take minutes.
    exec(code.replace("server =", "params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1\nserver =", 1), {})
    lines = capsys.readouterr().out
    assert lines.count("A young") == 3
    assert len(lines) > 100


def test_control_tokens_are_never_sampled(model_dir, engine, tmp_path):
    """Even if the model finds them likely, as a LoRA run of a GPT-Neo finds the beginning where it finds the end."""
    torch.manual_seed(0)
    run = write_run(tmp_path, model_dir, GPTNeoForCausalLM(tiny_config()))
    model = load_pretrained(str(run), torch.float32).eval()
    logits = model(torch.tensor([[500, 40, 41]])).logits[0, -1]
    model.transformer.wte.weight.data[501] = 2 * model.transformer.wte.weight.data[logits.argmax()]
    model.save_pretrained(run)
    llama_cpp = engine(exported(run))
    answer = llama_cpp.ask("/completion", prompt=[500, 40, 41], n_predict=20, temperature=0, n_probs=1)
    likeliest = [place["top_logprobs"][0]["id"] for place in answer["completion_probabilities"]]
    drawn = [place["id"] for place in answer["completion_probabilities"]]
    assert 501 in likeliest
    assert not {500, 501} & set(drawn)


# ---- Llamas, adapters, other shapes -----------------------------------------------------------------------


def write_llama(folder: Path, model_dir: Path, name: str = "llama", **changes) -> Path:
    """A Llama with fresh weights, whose logits are far apart."""
    torch.manual_seed(0)
    config = LlamaConfig(**(OTHERS[name].to_dict() | {"initializer_range": 0.2} | changes))
    return write_run(folder, model_dir, LlamaForCausalLM(config))


@pytest.mark.parametrize("name", ["llama", "llama-untied"])
def test_a_llama(model_dir, titles, engine, tmp_path, name):
    run = write_llama(tmp_path, model_dir, name, rms_norm_eps=1e-3, rope_parameters={"rope_theta": 500.0})
    file = exported(run)
    assert ("output.weight" in {tensor.name for tensor in GGUFReader(file).tensors}) == (name == "llama-untied")
    same, largest_gap, perplexity = compare(file, run, titles[-10:], engine)
    assert same >= 0.999
    assert largest_gap < NEAR_TIE
    assert perplexity == pytest.approx(1, abs=1e-3)
    assert engine(file).ask("/props")["default_generation_settings"]["n_ctx"] == 128
    same, _, _ = compare(exported(run, "--dtype", "q8_0"), run, titles[-10:], engine)
    assert same > 0.8


def test_adapters_are_merged(model_dir, titles, engine, tmp_path):
    (tmp_path / "base").mkdir()
    base = write_llama(tmp_path / "base", model_dir)
    tokenizer = load_tokenizer(str(base))
    torch.manual_seed(1)
    adapted = load_model(str(base), tokenizer, torch.bfloat16, SAMPLING_DEFAULTS, lora={"rank": 4, "alpha": 8})
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    run = tmp_path / "run"
    run.mkdir()
    save_adapters(adapted, collect_adapters(adapted), run)
    tokenizer.save_pretrained(run)
    file = exported(run, "--dtype", "float32")  # bf16 adapters on fp32 weights: merged in fp32
    same, _, perplexity = compare(file, run, titles[-10:], engine)
    assert same >= 0.999
    assert perplexity == pytest.approx(1, abs=1e-3)
    same, _, _ = compare(file, base, titles[-10:], engine)
    assert same < 0.9, "adapters that change nothing"


def test_rows_that_q8_0_cannot_hold(model_dir, titles, engine, tmp_path, capsys):
    """48 does not divide into blocks of 32; the MLP's 192 do."""
    torch.manual_seed(0)
    config = tiny_config(hidden_size=48, window_size=CONTEXT)
    run = write_run(tmp_path, model_dir, GPTNeoForCausalLM(config))
    file = exported(run, "--dtype", "q8_0")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(file).tensors}
    assert kinds["token_embd.weight"] == kinds["blk.3.attn_qkv.weight"] == "F16"
    assert kinds["blk.3.ffn_down.weight"] == "Q8_0"
    assert "13 matrices are float16" in capsys.readouterr().out
    same, _, perplexity = compare(file, run, titles[-10:], engine)
    assert same > 0.95
    assert perplexity == pytest.approx(1, abs=0.02)


# ---- what the file says -----------------------------------------------------------------------------------


def fields_of(file: Path) -> dict:
    return {name: field.contents() for name, field in GGUFReader(file).fields.items()}


def test_facts_of_a_file(model_dir, tmp_path):
    torch.manual_seed(0)
    run = write_run(tmp_path, model_dir, GPTNeoForCausalLM(tiny_config()), torch.bfloat16, temperature=0.7)
    (run / RUN_FILE).write_text(json.dumps({"model": "EleutherAI/gpt-neo-125M"}))
    (run / RESULTS_FILE).write_text("{}")
    file = exported(run)
    fields = fields_of(file)
    assert fields["general.architecture"] == "gpt2"
    assert fields["general.name"] == run.name
    assert fields["general.license"] == "mit"
    assert "240 positions are left out" in fields["general.description"]
    assert fields["gpt2.context_length"] == 16
    assert fields["general.sampling.temp"] == pytest.approx(0.7)
    assert fields["tokenizer.ggml.suppress_tokens"] == [500, 501]
    ids = [fields[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding", "unknown")]
    assert ids == [500, 0, 501, 0]
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(file).tensors}
    assert kinds["token_embd.weight"] == "BF16", "as saved"
    assert "output.weight" not in kinds, "tied"


def test_an_untied_head_is_written_too(model_dir, tmp_path):
    torch.manual_seed(0)
    run = write_run(tmp_path, model_dir, GPTNeoForCausalLM(tiny_config(tie_word_embeddings=False)))
    (head,) = [tensor.data for tensor in GGUFReader(exported(run)).tensors if tensor.name == "output.weight"]
    weights = load_pretrained(str(run), torch.float32).lm_head.weight
    torch.testing.assert_close(torch.tensor(head), weights[:502].detach(), atol=0, rtol=0)


def test_a_model_from_elsewhere(model_dir, tmp_path):
    """GPT-Neo's tokenizer as the hub has it: one control token for beginning and end, none for padding."""
    fields = fields_of(exported(Path(shutil.copytree(model_dir, tmp_path / "base"))))
    assert fields["tokenizer.ggml.bos_token_id"] == fields["tokenizer.ggml.eos_token_id"] == 0
    assert not {"tokenizer.ggml.padding_token_id", "tokenizer.ggml.suppress_tokens"} & fields.keys()
    lines = next((tmp_path / "base").glob("*.Modelfile")).read_text().splitlines()
    assert [line for line in lines if " stop " in line] == ['PARAMETER stop "<|endoftext|>"']


def test_transformers_reads_the_same_model(model_dir, tmp_path):
    """Another program than llama.cpp, and one that is always here."""
    run = write_llama(tmp_path, model_dir)
    file = exported(run)
    theirs = AutoModelForCausalLM.from_pretrained(run, gguf_file=file.name, dtype=torch.float32).eval()
    ids = torch.randint(502, (4, 100), generator=torch.Generator().manual_seed(1))
    ours = load_pretrained(str(run), torch.float32).eval()
    torch.testing.assert_close(theirs(ids).logits, ours(ids).logits[..., :502], atol=1e-4, rtol=1e-4)


# ---- whole or not at all, and refusals ------------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["write_modelfile", "encode"])
def test_an_interrupted_export_leaves_nothing(run_dir, tmp_path, monkeypatch, broken):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf_file, broken, interrupt)
    with pytest.raises(KeyboardInterrupt):
        main(["--to", "gguf", str(run_dir), str(tmp_path / "a.gguf")])
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_seen_before_anything_is_written(run_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("neoflix.exporting.targets.free_bytes", lambda folder: 1000)
    with pytest.raises(ValueError, match=r"OUT: the weights need .* disk space"):
        main(["--to", "gguf", str(run_dir), str(tmp_path / "a.gguf")])
    assert not list(tmp_path.iterdir())


REFUSALS = {
    "another suffix": (["run", "out.bin"], "OUT out.bin: must be a file whose name ends in .gguf"),
    "a folder": (["run", "folder"], "OUT folder: must be a file whose name ends in .gguf"),
    "a folder with the suffix": (["run", "folder.gguf"], "OUT folder.gguf: folder.gguf exists already"),
    "a file": (["run", "old.gguf"], "OUT old.gguf: old.gguf exists already"),
    "its Modelfile": (["run", "other.gguf"], "OUT other.gguf: other.Modelfile exists already"),
    "no place to write": (["run", "/proc/out.gguf"], "OUT /proc/out.gguf: cannot be written"),
    "another model": (["gpt2", "a.gguf"], "RUN gpt2: its model is a gpt2; only a gpt_neo or llama can be written"),
    "another activation": (["relu", "a.gguf"], "RUN relu: its config has activation_function relu"),
    "scaled rotations": (["scaled", "a.gguf"], "RUN scaled: its config has rope_type linear"),
    "biases": (["biased", "a.gguf"], "RUN biased: its config has attention_bias True"),
    "another tokenizer": (["lowercase", "a.gguf"], "RUN lowercase: its tokenizer is not a byte-level BPE"),
    "q8_0 elsewhere": (["--dtype", "q8_0", "run", "out", "--to", "gpt2"], "--dtype q8_0: only --to gguf writes it"),
}


@pytest.fixture(scope="module")
def runs_to_refuse(run_dir, model_dir, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("refused")
    for name in ("run", "gpt2", "relu", "lowercase"):
        shutil.copytree(run_dir, folder / name, ignore=shutil.ignore_patterns("*.gguf", "*.Modelfile", "base"))
    (folder / "gpt2" / "config.json").write_text(json.dumps(GPT2Config().to_dict()))
    config = json.loads((folder / "relu" / "config.json").read_text())
    (folder / "relu" / "config.json").write_text(json.dumps(config | {"activation_function": "relu"}))
    changes = {"tokenizer.json": {"normalizer": {"type": "Lowercase"}}}
    changes["tokenizer_config.json"] = {"tokenizer_class": "PreTrainedTokenizerFast"}  # GPT-2's class has no normalizer
    for name, change in changes.items():
        path = folder / "lowercase" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    for name, changes in (("scaled", {"rope_parameters": rope}), ("biased", {"attention_bias": True})):
        (folder / name).mkdir()
        write_llama(folder / name, model_dir, **changes)
    for name in ("folder", "folder.gguf"):
        (folder / name).mkdir()
    for name in ("old.gguf", "other.Modelfile"):
        (folder / name).write_text("kept")
    return folder


@pytest.mark.parametrize("case", REFUSALS)
def test_what_it_cannot_do_is_one_sentence_and_exit_code_2(runs_to_refuse, case, capfd, monkeypatch):
    words, message = REFUSALS[case]
    monkeypatch.chdir(runs_to_refuse)
    before = sorted(runs_to_refuse.rglob("*"))
    assert exit_code_of(lambda: main(["--to", "gguf", *words])) == 2
    (said,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in said
    assert sorted(runs_to_refuse.rglob("*")) == before


def test_a_weight_too_large_for_float16_is_refused(model_dir, tmp_path):
    run = write_run(tmp_path, model_dir, GPTNeoForCausalLM(tiny_config()))
    model = GPTNeoForCausalLM.from_pretrained(run)
    model.transformer.h[0].attn.attention.q_proj.weight.data[0, 0] = 60_000.0
    model.save_pretrained(run)
    with pytest.raises(ValueError, match=r"blk\.0\.attn_qkv\.weight overflows F16; use --dtype bfloat16"):
        exported(run, "--dtype", "float16")
    assert not list(run.glob("*.gguf*")) + list(run.glob("*.Modelfile"))
