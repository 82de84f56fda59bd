"""Shapes of models by their config alone, against the models themselves."""

import json

import pytest
import torch
from conftest import shape_of, tiny_config

from neoflix.model.load import build_model
from neoflix.model.shape import HUB_SHAPES, gpt_neo_shape, pad_vocab_size, read_shape


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


def test_other_architectures_are_built_and_counted(other_architecture):
    model, shape = other_architecture
    assert shape.num_parameters == model.num_parameters()
    assert shape.is_tied == model.config.tie_word_embeddings
    num_multiplied = model.num_parameters() - (0 if shape.is_tied else model.get_input_embeddings().weight.numel())
    assert shape.products(10.0)[0] == num_multiplied
    layer = next(block for block in model.modules() if isinstance(block, torch.nn.ModuleList))[0]
    assert shape.layer_parameters == pytest.approx(sum(w.numel() for w in layer.parameters()), rel=0.5)


def test_parameters_are_counted_right(tmp_path):
    for overrides in ({}, {"num_layers": 6, "hidden_size": 64, "attention_types": [[["global", "local"], 3]]}):
        config = tiny_config(vocab_size=512, **overrides)  # a multiple of 64, as a run pads it
        config.save_pretrained(tmp_path)
        assert read_shape(str(tmp_path)).num_parameters == build_model(config, torch.float32).num_parameters()
    assert shape_of("2.7B").num_parameters == pytest.approx(2.65e9, rel=0.01)
    assert shape_of("1.3B").num_parameters == pytest.approx(1.32e9, rel=0.01)
    assert shape_of("125M").num_parameters == pytest.approx(0.125e9, rel=0.01)


def test_sizes_are_padded_to_a_multiple_of_64():
    assert [pad_vocab_size(size) for size in (1, 64, 65, 50257, 50304)] == [64, 64, 128, 50304, 50304]
