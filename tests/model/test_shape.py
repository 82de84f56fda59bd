"""Shapes of models by their config alone, against the models themselves."""

import json

import numpy as np
import pytest
import torch
from conftest import shape_of, tiny_config
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig

from neoflix.arguments.reader import read_train_flags
from neoflix.data.packing import PaddedCollator, TokenBatches
from neoflix.model.load import build_model
from neoflix.model.shape import HUB_SHAPES, Shape, gpt_neo_shape, read_shape
from neoflix.planning.device_memory import activation_bytes
from neoflix.planning.forecast import Plan, forecast
from neoflix.planning.lengths import Texts
from neoflix.planning.remedies import smallest_changes
from neoflix.planning.settings import Settings, read_settings
from neoflix.planning.table import plan_table
from neoflix.runtime.hardware import Machine

LLAMA = LlamaConfig(
    vocab_size=512,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=160,
    max_position_embeddings=128,
    tie_word_embeddings=True,
)
OTHERS = {
    "llama": LLAMA,
    "llama-untied": LlamaConfig(**(LLAMA.to_dict() | {"tie_word_embeddings": False})),
    "gpt2": GPT2Config(vocab_size=512, n_embd=64, n_layer=3, n_head=4, n_positions=128),
    "gpt-neox": GPTNeoXConfig(
        vocab_size=512, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256
    ),
}


@pytest.fixture(params=OTHERS)
def other(request, tmp_path):
    """(a small model of another architecture, its shape by config.json)"""
    config = OTHERS[request.param]
    config.save_pretrained(tmp_path)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32), read_shape(str(tmp_path))


def test_gpt_neo_is_counted_by_hand(tmp_path):
    tiny_config(vocab_size=512).save_pretrained(tmp_path)
    assert read_shape(str(tmp_path)) == gpt_neo_shape(json.loads((tmp_path / "config.json").read_text()))
    shapes = [gpt_neo_shape(config) for config in HUB_SHAPES.values()]
    assert [round(shape.num_parameters / 1e6) for shape in shapes] == [125, 1316, 2651]


def test_layers_of_gpt_neo_are_those_of_the_model():
    model = build_model(tiny_config(vocab_size=512), torch.float32)
    shape = gpt_neo_shape(model.config.to_dict())
    counted = sum(w.numel() for w in model.transformer.h[0].parameters() if w.dim() == 2)
    assert shape.layer_parameters == counted


def test_other_architectures_are_built_and_counted(other):
    model, shape = other
    assert shape.num_parameters == model.num_parameters()
    assert shape.is_tied == model.config.tie_word_embeddings
    num_multiplied = model.num_parameters() - (0 if shape.is_tied else model.get_input_embeddings().weight.numel())
    assert shape.products(10.0)[0] == num_multiplied
    layer = next(block for block in model.modules() if isinstance(block, torch.nn.ModuleList))[0]
    assert shape.layer_parameters == pytest.approx(sum(w.numel() for w in layer.parameters()), rel=0.5)


@pytest.mark.parametrize("recomputes", [False, True])
def test_activations_of_other_architectures(other, recomputes):
    """By autograd's hooks on the real model; the plan's come from fake tensors."""
    model, shape = other
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept = {}

    def remember(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    if recomputes:
        model.activation_checkpointing_enable({"use_reentrant": False})
    ids = torch.ones(4, 32, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        model.train()(input_ids=ids, attention_mask=ids, use_cache=False)
    counted = sum(storage.nbytes() for storage in kept.values())
    settings = make_settings(shape, 32.0, recomputes)
    expected = activation_bytes(shape, settings, ids.numel())
    if recomputes:  # the layer that is computed again is there only while it is
        expected -= ids.numel() * shape.kept_bytes[1] / shape.num_layers
    assert counted == pytest.approx(expected, rel=0.25)


def make_settings(shape, mean: float, recomputes: bool = False) -> Settings:
    texts = Texts(100, 10, mean, 5.0, 64, "given")
    words = ["--plan", "--activation_checkpointing", str(recomputes).lower()]
    return read_settings(read_train_flags(words), shape, texts, Machine(2**40, None, 2), {})


# ---- padding ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lengths_N():  # noqa: N802
    return np.random.default_rng(0).normal(32, 5, 7000).clip(8, 64).round().astype(np.int64)


def measure(batches, lengths_N) -> tuple[int, float]:
    """(most tokens that one of the batches computes, tokens computed for each real one), by the collator."""
    sizes = []
    for batch in batches:
        rows = [{"input_ids": [1] * lengths_N[i], "prompt_length": 1} for i in batch]
        sizes.append(PaddedCollator(0)(rows)["input_ids"].numel())
    return max(sizes), sum(sizes) / lengths_N.sum()


def texts_of(lengths_N) -> Texts:
    return Texts(len(lengths_N), 0, lengths_N.mean(), lengths_N.std(), int(lengths_N.max()), "given")


@pytest.mark.parametrize("num_texts", [1, 4, 16, 64])
def test_padding_of_a_count_of_texts(num_texts, lengths_N):
    shuffled = np.random.default_rng(1).permutation(len(lengths_N))
    batches = [shuffled[start : start + num_texts] for start in range(0, len(shuffled), num_texts)]
    most, padding = measure(batches, lengths_N)
    texts = texts_of(lengths_N)
    assert texts.of_batch(num_texts, packed=False) == most
    assert texts.padding(num_texts, None, packed=False) == pytest.approx(padding, rel=0.03)
    assert texts.padding(num_texts, None, packed=True) == 1


@pytest.mark.parametrize("budget", [256, 640, 2048])
def test_padding_of_a_budget_of_tokens(budget, lengths_N):
    """The budget holds real tokens; padded to the longest text of each batch they are more."""
    most, padding = measure(TokenBatches(lengths_N, budget, 1, 0, 1, 0), lengths_N)
    texts = texts_of(lengths_N)
    assert texts.of_budget(budget, packed=False) == pytest.approx(most, rel=0.1)
    assert texts.of_budget(budget, packed=True) == budget
    assert texts.padding(None, budget, packed=False) == pytest.approx(padding, rel=0.1)


def test_plan_of_a_padded_model_counts_padding(tmp_path):
    LLAMA.save_pretrained(tmp_path)
    shape, texts = read_shape(str(tmp_path)), Texts(7008, 779, 32.0, 5.0, 51, "given")
    machine = Machine(2**40, None, 2)

    def plan(*words: str, of=shape) -> Plan:
        settings = read_settings(read_train_flags(["--plan", *words]), of, texts, machine, {})
        return forecast(of, texts, settings, machine)

    by_budget = plan("--tokens_per_device_batch", "640")
    assert by_budget.settings.batch_tokens == 20 * 51
    assert by_budget.settings.train_tokens < by_budget.settings.num_steps * 641, "real tokens, as a run reports them"
    assert "1,020 tokens, padding included" in plan_table(by_budget)
    for words in (("--tokens_per_device_batch", "640"), ("--per_device_train_batch_size", "16")):
        padded, packed = plan(*words), plan(*words, of=gpt_neo_shape({"num_layers": 3, "hidden_size": 64}))
        assert 1.2 < padded.settings.padding < 1.5
        assert packed.settings.padding == 1
        per_token = padded.flops / padded.settings.train_tokens / padded.settings.padding
        assert per_token == pytest.approx(6 * shape.num_parameters + 6 * 3 * 64 * texts.mean)


def test_memory_of_a_llama_is_what_was_measured():
    """SmolLM2-135M's shape, ZeRO-0 in fp32 on two Xeon cores, 7,008 texts of at most 51 tokens, 32 at once, GiB."""
    kept = (793268.0, 1444660.0)
    shape = Shape(30, 576, 1536, 49152, 134515008, 2048, False, 305280, 210, kept_bytes=kept)
    texts, machine = Texts(7008, 779, 32.0, 5.0, 51, "given"), Machine(2**40, None, 2)
    for words, measured in (([], 7.3), (["--lora", "true"], 7.0)):
        args = read_train_flags(["--plan", "--per_device_train_batch_size", "32", *words])
        settings = read_settings(args, shape, texts, machine, {})
        assert forecast(shape, texts, settings, machine).host_bytes / 2**30 == pytest.approx(measured, rel=0.1)


def test_changes_of_a_padded_run_keep_its_budget(tmp_path):
    LLAMA.save_pretrained(tmp_path)
    shape, texts = read_shape(str(tmp_path)), Texts(7008, 779, 32.0, 5.0, 51, "given")
    args = read_train_flags(["--plan", "--tokens_per_device_batch", "6400"])
    roomy = Machine(2**40, None, 2)
    whole = forecast(shape, texts, read_settings(args, shape, texts, roomy, {}), roomy)
    tight = Machine(int(whole.host_bytes * 0.9), None, 2)
    words, changed = smallest_changes(forecast(shape, texts, read_settings(args, shape, texts, tight, {}), tight))[0]
    assert words == "--tokens_per_device_batch 3200 --gradient_accumulation_steps 2"
    again = read_settings(read_train_flags(["--plan", *words.split()]), shape, texts, tight, {})
    assert again.batch_tokens == changed.settings.batch_tokens


def test_parameters_are_counted_right(tmp_path):
    for overrides in ({}, {"num_layers": 6, "hidden_size": 64, "attention_types": [[["global", "local"], 3]]}):
        config = tiny_config(vocab_size=512, **overrides)  # a multiple of 64, as `model.py` makes it
        config.save_pretrained(tmp_path)
        assert read_shape(str(tmp_path)).num_parameters == build_model(config, torch.float32).num_parameters()
    assert shape_of("2.7B").num_parameters == pytest.approx(2.65e9, rel=0.01)
    assert shape_of("1.3B").num_parameters == pytest.approx(1.32e9, rel=0.01)
    assert shape_of("125M").num_parameters == pytest.approx(0.125e9, rel=0.01)
