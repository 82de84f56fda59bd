import pytest
from conftest import as_examples
from datasets import Dataset

from neoflix.data.hub import find_hub_copy, hub_copy_file
from neoflix.data.sources import find_dataset, read_examples
from neoflix.runtime.errors import UserError


def test_a_data_set_of_the_hub_is_a_table(tmp_path, monkeypatch):
    """`datasets` loads a folder as it does a name of the hub: the same code, without the network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "poems"
    for split, texts in (("train", ["One.", "Two."]), ("test", ["Three."])):
        Dataset.from_dict({"text": texts, "label": [1] * len(texts)}).to_parquet(
            folder / f"{split}-00000-of-00001.parquet"
        )
    assert read_examples(find_dataset(f"hf:{folder}", tmp_path / "cache"), "text") == as_examples(["One.", "Two."])
    again = find_dataset(f"hf:{folder}:test", tmp_path / "cache")
    assert read_examples(again, "text") == as_examples(["Three."])
    assert find_dataset(f"hf:{folder}:test", tmp_path / "cache") == again
    for name in (f"hf:{folder}:none", f"hf:{tmp_path / 'nowhere'}", "hf:"):
        with pytest.raises(UserError, match="--dataset hf:") as error:
            find_dataset(name, tmp_path / "cache")
        assert "\n" not in str(error.value)


def test_copies_of_similar_names_are_kept_apart(tmp_path):
    names = ("hf:a/b", "hf:a-b", "hf:a/b@c", "hf:a/b:test", "hf:a/b:train[:10]", "hf:a/b/c:train")
    files = {name: hub_copy_file(name, "0123456789abcdef", tmp_path) for name in names}
    for file in files.values():
        file.touch()
    assert {name: find_hub_copy(name, tmp_path) for name in names} == files
    assert find_hub_copy("hf:a/b:train", tmp_path) == files["hf:a/b"], "the split by default"
    assert find_hub_copy("hf:a", tmp_path) is None
