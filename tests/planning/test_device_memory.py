"""Device memory: the formulas against what autograd keeps, arithmetic, and what was allocated."""

import json
from dataclasses import replace

import pytest
import torch
from cases import comparisons
from conftest import GIB, NETFLIX, ROOT, card, forecast_of, shape_of, tiny_config
from table import compare_phases

from neoflix.arguments.deepspeed_file import read_ds_config
from neoflix.arguments.reader import read_train_flags
from neoflix.data.packing import PackedCollator
from neoflix.model.load import build_model
from neoflix.model.lora import add_adapters
from neoflix.planning.activations import activation_bytes
from neoflix.planning.forecast import Plan, forecast
from neoflix.planning.lengths import Texts
from neoflix.planning.settings import Settings, read_settings
from neoflix.runtime.hardware import Machine


@pytest.mark.parametrize(("recomputes", "lora_rank"), [(False, 0), (True, 0), (False, 8)])
@pytest.mark.parametrize(("num_layers", "width"), [(4, 64), (8, 128)])
def test_activations_are_those_that_autograd_keeps(num_layers, width, recomputes, lora_rank):
    """Counted by its saved-tensor hooks: storages once, weights and logits left out."""
    config = tiny_config(
        vocab_size=512,
        num_layers=num_layers,
        hidden_size=width,
        attention_types=[[["global", "local"], num_layers // 2]],
    )
    model = build_model(config, torch.float32).train()
    if lora_rank:
        model = add_adapters(model, lora_rank, 2 * lora_rank, "none").train()
    if recomputes:
        model.activation_checkpointing_enable()
    lengths = [30, 27, 32, 25, 31, 18, 32, 29]
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept = {}

    def remember(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.is_floating_point():
            kept[storage.data_ptr()] = storage  # held: no other tensor gets its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        model(**PackedCollator()([{"input_ids": list(range(1, length + 1)), "prompt_length": 1} for length in lengths]))
    logits = sum(lengths) * 512 * 4
    counted = sum(storage.nbytes() for storage in kept.values()) - logits
    settings = forecast_of("125M", Machine(0, 0, 1)).settings
    settings = replace(settings, recomputed_layers=recomputes * num_layers, lora_rank=lora_rank)
    shape = replace(shape_of("125M"), num_layers=num_layers, width=width, inner=4 * width, vocab_size=512)
    shape = replace(shape, num_linear=6 * num_layers)
    expected = activation_bytes(shape, settings, sum(lengths))
    if recomputes:  # the recomputed layer is kept only for a moment
        expected -= activation_bytes(replace(shape, num_layers=0), replace(settings, recomputed_layers=0), sum(lengths))
        expected += sum(lengths) * 4 * 2 * width
    assert counted == pytest.approx(expected, rel=0.04)


def settings_of(shape, mean: float, recomputes: bool = False) -> Settings:
    texts = Texts(100, 10, mean, 5.0, 64, "given")
    words = ["--plan", "--activation_checkpointing", str(recomputes).lower()]
    return read_settings(read_train_flags(words), shape, texts, Machine(2**40, None, 2), {})


@pytest.mark.parametrize("recomputes", [False, True])
def test_activations_of_other_architectures(other_architecture, recomputes):
    """By autograd's hooks on the real model; the plan's come from fake tensors."""
    model, shape = other_architecture
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
    settings = settings_of(shape, 32.0, recomputes)
    expected = activation_bytes(shape, settings, ids.numel())
    if recomputes:  # the layer that is computed again is there only while it is
        expected -= ids.numel() * shape.kept_bytes[1] / shape.num_layers
    assert counted == pytest.approx(expected, rel=0.25)


def states(forecast: Plan) -> float:
    """Weights, optimizer, gradients and buckets on one device, GB."""
    parts = forecast.device_phases["step"] | {"buffers": forecast.device_phases["backward"]["buffers"]}
    return sum(parts[part] for part in ("weights", "optimizer", "gradients", "gradients' fp32 copies", "buffers")) / 1e9


def test_states_are_those_of_the_zero_papers(processes):
    """Bytes a parameter, by the arithmetic that ds_configs/*.md works out: 18 alone; 2 + 16 / N on several."""
    alone = forecast_of("2.7B", card(80), deepspeed="ds_configs/no_offload.json")
    assert states(alone) == pytest.approx(2.65 * 18 + 0.4, rel=0.005)
    for num_processes, gigabytes in {2: 27.3, 3: 20.2, 4: 16.7, 8: 11.4}.items():
        processes(num_processes)
        several = forecast_of("2.7B", card(80), deepspeed="ds_configs/multi_gpu.json")
        assert states(several) == pytest.approx(gigabytes, rel=0.005)
    processes(4)
    zero_1 = forecast_of("2.7B", card(80), deepspeed="ds_configs/multi_gpu_zero1.json")
    assert states(zero_1) == pytest.approx(2.65 * (2 + 2 + (12 + 2 + 4) / 4) + 0.8, rel=0.005)
    zero_3 = forecast_of("2.7B", card(80), deepspeed="ds_configs/zero3_offload.json")
    assert zero_3.device["optimizer"] == zero_3.device["weights"] == 0


# What torch allocated on a stand-in for the CUDA runtime, whose allocations are real (`make rehearse`).
REHEARSED = [json.loads(line) for line in (ROOT / "benchmarks/results/rehearsal.jsonl").read_text().splitlines()]
COMPARED = [line for line in REHEARSED if "compared" in line]


@pytest.mark.parametrize("line", COMPARED, ids=[line["case"] for line in COMPARED])
def test_each_phase_takes_what_the_plan_says(line):
    phases = compare_phases(line)
    assert {"start", "forward", "backward", "step", "evaluate", "sample", "save the best"} <= phases.keys()
    for phase, (planned, measured) in phases.items():
        assert planned == pytest.approx(measured, rel=0.05, abs=0.1 * GIB), phase


def test_every_set_up_and_size_was_rehearsed():
    assert {line["case"] for line in COMPARED} == {case.name for case in comparisons()}
    assert not [line["case"] for line in REHEARSED if line["faults"]]


def test_a_small_card_is_refused_for_deepspeeds_start(processes):
    """Weights and their flat copy take more than training with activation checkpointing does."""
    planned = forecast_of("2.7B", card(10), "--activation_checkpointing", "true")
    assert not planned.fits
    assert planned.device["weights, flattened"] == planned.device["weights"]
    processes(2)
    shared = forecast_of("2.7B", card(10), "--activation_checkpointing", "true").device_phases["start"]
    assert shared["weights, flattened"] == shared["weights"] // 2


def test_all_gradients_are_there_at_the_first_reduction(processes):
    """In fp32 twice as many as in bf16; with an offloaded optimizer they go to the host one by one."""
    wide = forecast_of("2.7B", card(80), deepspeed="ds_configs/no_offload.json")
    assert wide.device == wide.device_phases["first reduction"]
    config = read_ds_config("ds_configs/no_offload.json")
    del config["data_types"]
    narrow = forecast(wide.shape, NETFLIX, replace(wide.settings, ds_config=config), card(80))
    assert 2 * narrow.device_phases["first reduction"]["gradients"] == wide.device["gradients"]
    assert "first reduction" not in forecast_of("2.7B", card(80)).device_phases
