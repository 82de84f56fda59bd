"""Which architectures are trained and sampled: those that docs/loading.md lists, by name; what happens to others."""

import json
import shutil

import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM, ByT5Tokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import generate
import train
from neoflix.arguments.sampling import SAMPLING_DEFAULTS
from neoflix.data.packing import PaddedCollator
from neoflix.data.tokenizer import load_tokenizer
from neoflix.model.load import load_model, load_pretrained
from neoflix.model.vocabulary import get_window
from neoflix.runtime.errors import UserError
from neoflix.runtime.processes import exit_code_of
from neoflix.sampling.architectures import GenerateDecoder, check_can_be_sampled, find_decoder, makes_slots
from neoflix.sampling.decoder import Decoder, DecoderSettings, Text
from neoflix.sampling.draw import Draw
from neoflix.sampling.sampler import Sampler

SMALL = {
    "vocab_size": 500,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,  # see conftest.tiny_config
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
SLIDING = {**GROUPED, "sliding_window": 8}
WINDOW = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}

# docs/loading.md lists these by their first words.
SLOTS = {
    "GPT-2": ("gpt2", {}),
    "GPT-J": ("gptj", {"rotary_dim": 4}),
    "GPT-NeoX (Pythia)": ("gpt_neox", {"tie_word_embeddings": False}),
    "OPT": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0, "init_std": 0.2}),
    "Llama": ("llama", GROUPED),
    "Llama, tied": ("llama", {**GROUPED, "tie_word_embeddings": True}),
    "Mistral": ("mistral", SLIDING),
    "Qwen2": ("qwen2", {"num_key_value_heads": 2}),
    "Qwen2, sliding": ("qwen2", {"num_key_value_heads": 2, **WINDOW}),
    "Qwen3": ("qwen3", GROUPED),
    "Qwen3, sliding": ("qwen3", {**GROUPED, **WINDOW}),
    "Phi": ("phi", {}),
    "Gemma": ("gemma", GROUPED),
    "Gemma 2": ("gemma2", {**SLIDING, "query_pre_attn_scalar": 8}),
    "Gemma 3": (
        "gemma3_text",
        {**SLIDING, "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "BLOOM": ("bloom", {"n_head": 4, "n_layer": 2, "seq_length": 128}),
    "Falcon": ("falcon", {"alibi": False, "multi_query": True, "new_decoder_architecture": False}),
    "Falcon, grouped": ("falcon", {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "Falcon, ALiBi": ("falcon", {"alibi": True, "multi_query": False, "new_decoder_architecture": False}),
}
BY_GENERATE = {
    "OpenAI GPT": ("openai-gpt", {}),
    "Mamba": ("mamba", {"state_size": 4}),
    "Jamba": ("jamba", {**GROUPED, "num_experts": 2, "attn_layer_offset": 1, "attn_layer_period": 2}),
    "RWKV": ("rwkv", {"attention_hidden_size": 32, "context_length": 128}),
    "RecurrentGemma": (
        "recurrent_gemma",
        {"lru_width": 32, "attention_window_size": 8, "block_types": ["recurrent", "attention"]},
    ),
    "Lfm2": ("lfm2", {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}),
}
REFUSED = {
    "RoBERTa": ("roberta", {"is_decoder": True, "pad_token_id": 1}),
    "RoBERTa, both directions": ("roberta", {"pad_token_id": 1}),
    "BERT, both directions": ("bert", {}),
}
ALL = SLOTS | BY_GENERATE | REFUSED
PROMPTS = ["", "A", "Two brothers", "When the harbour freezes over, a retired pilot of great age", "A"]
NEW = 16


def save_untrained(name: str, model_dir, folder):
    """A folder as the hub has it: random weights, and the tests' tokenizer."""
    model_type, options = ALL[name]
    values = SMALL | options
    if model_type in ("bloom", "mamba", "rwkv"):  # their configs name the longest text otherwise, or not at all
        del values["max_position_embeddings"]
    shutil.copytree(model_dir, folder, ignore=shutil.ignore_patterns("config.json", "*.safetensors", "generation_*"))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**values))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(model_dir, titles, tmp_path_factory):
    """Returns a function: the folder of a named model after three steps of training as `train.py` has them."""
    folders = {}

    def find(name: str):
        if name not in folders:
            tmp_path = tmp_path_factory.mktemp("architecture")
            source, folders[name] = save_untrained(name, model_dir, tmp_path / "untrained"), tmp_path / "trained"
            tokenizer = load_tokenizer(str(source))
            settings = SAMPLING_DEFAULTS | {"max_new_tokens": NEW}
            model = load_model(str(source), tokenizer, torch.float32, settings).train()
            train_steps(model, tokenizer, titles[:8])
            model.save_pretrained(folders[name])
            tokenizer.save_pretrained(folders[name])
        return folders[name]

    return find


def train_steps(model, tokenizer, texts: list[str]) -> None:
    """Also holds that padding and the texts beside one make no difference to the loss."""
    rows = []
    for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        rows.append({"input_ids": [tokenizer.bos_token_id, *ids[:40], tokenizer.eos_token_id], "prompt_length": 1})
    collate, optimizer = PaddedCollator(tokenizer.pad_token_id), torch.optim.AdamW(model.parameters(), lr=1e-3)
    num_labels = sum(len(row["input_ids"]) - 1 for row in rows)
    model.eval()
    with torch.no_grad():
        together = model(**collate(rows)).loss * num_labels
        alone = sum(model(**collate([row])).loss * (len(row["input_ids"]) - 1) for row in rows)
    torch.testing.assert_close(together, alone, atol=1e-2, rtol=1e-5)
    model.train()
    before = None
    for _ in range(3):
        loss = model(**collate(rows)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        before = before or loss.item()
    assert loss.item() < before


def write(sampler: Sampler, prompts=PROMPTS, **settings) -> list[str]:
    return [sample.text for sample in sampler.sample(prompts=prompts, seed=5, **settings)]


def transformers_greedy(sampler: Sampler, folder) -> list[str]:
    """What transformers' own `generate` writes after each prompt, one by one."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    model.generation_config = GenerationConfig(
        max_new_tokens=NEW,
        eos_token_id=sampler.tokenizer.eos_token_id,
        pad_token_id=sampler.tokenizer.pad_token_id,
        suppress_tokens=sampler.never_sampled,
    )
    texts = []
    for prompt in PROMPTS:
        ids = model.generate(torch.tensor([sampler._encode(prompt)]))[0].tolist()
        texts.append(sampler.tokenizer.decode([i for i in ids[1:] if i != sampler.tokenizer.eos_token_id]).strip())
    return texts


def reread_greedy(sampler: Sampler, folder) -> list[str]:
    """What the model finds likeliest when it reads the whole text again for each token."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    texts = []
    for prompt in PROMPTS:
        ids = sampler._encode(prompt)
        for _ in range(NEW):
            with torch.no_grad():
                logits_V = model(torch.tensor([ids])).logits[0, -1]
            logits_V[sampler.never_sampled] = float("-inf")
            if (token := int(logits_V.argmax())) == sampler.tokenizer.eos_token_id:
                break
            ids.append(token)
        texts.append(sampler.tokenizer.decode(ids[1:]).strip())
    return texts


@pytest.mark.parametrize("name", SLOTS)
def test_listed_ones_are_sampled_as_transformers_does(name, trained):
    """Prompts of unlike length side by side and one after another in a slot, none among them, beyond the window."""
    folder = trained(name)
    sampler = Sampler.load(folder, device="cpu")
    expected = transformers_greedy(sampler, folder)
    assert len(set(expected)) > 2
    for batch_size in (1, 2, 5):
        assert write(sampler, top_k=1, batch_size=batch_size) == expected
    assert makes_slots(find_decoder(sampler.model))
    alone = write(sampler, num_samples=2, batch_size=1, temperature=1.0)
    assert write(sampler, num_samples=2, batch_size=5, temperature=1.0) == alone
    assert len(set(alone)) > 5
    in_int8 = Sampler.load(folder, device="cpu", int8=True)
    assert write(in_int8, batch_size=1) == write(in_int8, batch_size=5)


@pytest.mark.parametrize("name", BY_GENERATE)
def test_others_are_sampled_by_generate(name, trained, capsys):
    """Where its cache is wrong, as RecurrentGemma's and RWKV's, without it."""
    folder = trained(name)
    sampler = Sampler.load(folder, device="cpu")
    expected = reread_greedy(sampler, folder)
    for batch_size in (1, 5):
        assert write(sampler, top_k=1, batch_size=batch_size) == expected
    assert not makes_slots(find_decoder(sampler.model))
    assert capsys.readouterr().out.count("note: transformers' generate samples") == 1
    with pytest.raises(UserError, match=r"--int8: transformers' generate samples .* leave it out"):
        Sampler.load(folder, device="cpu", int8=True)
    prompts = ["", "", "A", "", "A"]
    alone = write(sampler, prompts, batch_size=1, temperature=1.0)
    assert write(sampler, prompts, batch_size=4, temperature=1.0) == alone
    assert len(set(alone)) > 2


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_sampled_is_refused_before_training(name, model_dir, tmp_path):
    source = save_untrained(name, model_dir, tmp_path / "model")
    message = rf"{source}: a {ALL[name][0]} model .*docs/loading\.md"
    for lora in (None, {"rank": 2, "alpha": 4.0}):
        model = load_model(str(source), load_tokenizer(str(source)), torch.float32, {}, lora=lora)
        with pytest.raises(UserError, match=message):
            check_can_be_sampled(model)
    with pytest.raises(UserError, match=message):
        write(Sampler.load(source, device="cpu"))


def test_both_decoders_draw_the_same_texts(trained):
    """Temperature, top_p, penalty, tokens that are never drawn, more candidates, texts that end: by the same noise."""
    sampler = Sampler.load(trained("Llama"), device="cpu")
    prompts = [sampler._encode(prompt) for prompt in PROMPTS]
    rows = []
    for make in (Decoder, GenerateDecoder):
        texts = [Text(index, prompt, NEW) for index, prompt in enumerate(prompts)]
        settings = DecoderSettings(
            num_slots=2,
            num_places=64,
            seed=3,
            draw=Draw(2.0, 0, 0.9, num_candidates=4),
            repetition_penalty=1.3,
            eos_token_id=3,
            never_drawn=range(40, 512),
        )
        for _ in make(sampler.model, settings).grow(texts):
            pass
        rows.append([(text.new_ids, text.finish_reason) for text in texts])
    assert rows[0] == rows[1]
    assert {reason for _, reason in rows[0]} == {"eos", "length"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["Gemma 3", "Falcon, ALiBi", "Jamba", "RoBERTa"])
def test_half_precision_makes_no_difference(name, dtype, model_dir, tmp_path):
    model = load_pretrained(str(save_untrained(name, model_dir, tmp_path / "model")), dtype)
    if name in REFUSED:
        with pytest.raises(UserError):
            find_decoder(model)
    else:
        assert makes_slots(find_decoder(model)) == (name in SLOTS)


def test_looking_leaves_the_model_as_it_was(model_dir, tmp_path):
    model = load_pretrained(str(save_untrained("Gemma 2", model_dir, tmp_path / "model")), torch.float32).train()
    state = torch.random.get_rng_state()
    find_decoder(model)
    assert (model.training, model.config.sliding_window) == (True, 8)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "limit"), [("Mistral", 128), ("BLOOM", 128), ("RWKV", 128), ("Mamba", 2048), ("Gemma 3", 128)]
)
def test_the_longest_text_is_not_the_sliding_window(name, limit, trained):
    sampler = Sampler.load(trained(name), device="cpu")
    assert (get_window(sampler.model), sampler.window) == (limit, limit)


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("t5", "a t5 model .*encoder"),
        ("bart", "a bart model .*encoder"),
        ("vit", "a vit model .*head"),
        ("gemma3", "a gemma3 model .*images"),
        ("llava", "a llava model .*images"),
        ("whisper", "a whisper model .*encoder"),
        ("distilbert", "a distilbert model .*head"),
    ],
)
def test_models_that_do_not_continue_text_are_refused(model_type, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(UserError, match=f"--model_name_or_path {tmp_path}: {message}"):
        load_pretrained(str(tmp_path), torch.float32)


def test_an_architecture_that_transformers_does_not_know(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt-17"}))
    with pytest.raises(UserError, match=r"transformers 5\.\S+ .*architecture"):
        load_pretrained(str(tmp_path), torch.float32)


def test_a_tokenizer_without_a_fast_form_is_refused(model_dir, tmp_path):
    ByT5Tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path}: its tokenizer, ByT5Tokenizer, .*tokenizer.json"):
        load_tokenizer(str(tmp_path))


def test_docs_list_what_is_tested():
    page = (ROOT / "docs" / "loading.md").read_text(encoding="utf-8")
    listed = page.split("## Architectures")[1]
    for name in [*SLOTS, *BY_GENERATE]:
        assert name.split(",")[0] in listed, name


# ---- whole runs --------------------------------------------------------------------------------------------


@pytest.mark.process
def test_both_programs_with_an_architecture_that_has_alibi(model_dir, train_words, tmp_path, capsys):
    source = save_untrained("Falcon, ALiBi", model_dir, tmp_path / "model")
    words = ["--model_name_or_path", str(source), "--max_steps", "2", "--num_progress_samples", "1"]
    train.main([*train_words, *words, "--deepspeed", str(ROOT / "ds_configs" / "cpu.json")])
    output = tmp_path / "samples.jsonl"
    generate.main(["--model_dir", str(tmp_path / "run"), "--num_samples", "3", "--output", str(output)])
    assert output.read_text(encoding="utf-8").count("\n") == 3


def test_training_refuses_before_it_begins(model_dir, train_words, tmp_path, capsys):
    source = save_untrained("RoBERTa", model_dir, tmp_path / "model")
    words = [*train_words, "--model_name_or_path", str(source), "--deepspeed", str(ROOT / "ds_configs" / "cpu.json")]
    assert exit_code_of(lambda: train.main(words)) == 2
    assert "a roberta model has other logits token by token" in capsys.readouterr().err
    assert not (tmp_path / "run" / "run.json").exists()


def test_the_rounding_of_a_deep_model_is_no_fault():
    torch.manual_seed(0)
    size = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    model = LlamaForCausalLM(LlamaConfig(**size, **heads, max_position_embeddings=128)).bfloat16()
    assert find_decoder(model) is Decoder
