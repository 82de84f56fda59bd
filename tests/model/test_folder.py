"""What a model's folder holds, by the names of its files."""

import json

import pytest

from neoflix.model.folder import ADAPTERS_CONFIG_FILE, ADAPTERS_FILE, has_weights, holds_adapters, list_loaded_files


@pytest.fixture
def folder(tmp_path):
    """folder("config.json", ...) has files of these names."""

    def make(*names: str):
        for name in names:
            (tmp_path / name).touch()
        return tmp_path

    return make


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", ADAPTERS_FILE])
def test_weights_in_safetensors(folder, name):
    assert not has_weights(folder("config.json", "pytorch_model.bin"))
    assert has_weights(folder(name))


def test_adapters_need_weights_and_a_config(folder):
    assert not holds_adapters(folder(ADAPTERS_CONFIG_FILE))
    assert holds_adapters(folder(ADAPTERS_FILE))
    assert not holds_adapters("somebody/something")


def test_a_model_is_loaded_from_its_shards_settings_and_tokenizer_alone(folder):
    loaded = ["config.json", "merges.txt", "part-1.safetensors", "part-2.safetensors", "tokenizer.json"]
    path = folder(*loaded, "README.md", "another.safetensors", "optimizer.pt")
    index = {"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors", "c": "part-1.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [file.name for file in list_loaded_files(path)] == sorted([*loaded, "model.safetensors.index.json"])
