"""Local copies of the hub's data sets, and their names."""

from neoflix.data.hub_copies import find_hub_copy, hub_copy_file


def test_copies_of_similar_names_are_kept_apart(tmp_path):
    names = ("hf:a/b", "hf:a-b", "hf:a/b@c", "hf:a/b:test", "hf:a/b:train[:10]", "hf:a/b/c:train")
    files = {name: hub_copy_file(name, "0123456789abcdef", tmp_path) for name in names}
    for file in files.values():
        file.touch()
    assert {name: find_hub_copy(name, tmp_path) for name in names} == files
    assert find_hub_copy("hf:a/b:train", tmp_path) == files["hf:a/b"], "the split by default"
    assert find_hub_copy("hf:a", tmp_path) is None
