"""A manifest tells a complete folder from any other; a failed write is remembered, not raised."""

import json

import pytest
import torch
from safetensors.torch import save_file

from neoflix.checkpoints.manifest import MANIFEST, Files, find_corruption, num_bytes, write_manifest
from neoflix.runtime.files import hash_file


@pytest.fixture
def folder(tmp_path):
    """A complete folder: a file that was hashed as it was written, and one in a folder of its own that was not."""
    files = Files(tmp_path / "whole")
    (files.folder / "inner").mkdir(parents=True)
    files.save({"weights": torch.arange(1000.0)}, files.folder / "state.pt")
    (files.folder / "inner" / "notes.txt").write_text("notes")
    write_manifest(files.folder, {"step": 3}, files.entries)
    return files.folder


def test_a_whole_folder_has_no_damage(folder):
    assert find_corruption(folder, checksums=True) is None
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["step"] == 3
    assert set(manifest["files"]) == {"state.pt", "inner/notes.txt"}
    assert num_bytes(folder) == (folder / "state.pt").stat().st_size + 5


def test_what_was_hashed_while_it_was_written_is_what_lies_there(tmp_path):
    files = Files(tmp_path)
    state = {"big": torch.randn(700_000), "small": torch.ones(1), "empty": torch.zeros(0), "word": "text"}
    files.save(state, tmp_path / "state.pt")
    assert files.error is None
    assert files.entries == {"state.pt": hash_file(tmp_path / "state.pt")}
    loaded = torch.load(tmp_path / "state.pt")
    assert torch.equal(loaded["big"], state["big"])
    assert loaded["word"] == "text"


def cut(path):
    path.write_bytes(path.read_bytes()[:-2])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "harm", "sentence"),
    [
        (MANIFEST, lambda path: path.unlink(), "save was interrupted"),
        (MANIFEST, cut, "save was interrupted"),
        (MANIFEST, lambda path: path.write_text("[1]"), "save was interrupted"),
        ("inner/notes.txt", lambda path: path.unlink(), "inner/notes.txt is missing"),
        ("state.pt", cut, "state.pt has"),
        ("state.pt", flip_a_bit, "state.pt does not match its checksum"),
    ],
)
def test_damage_is_found_and_named(folder, name, harm, sentence):
    harm(folder / name)
    assert sentence in find_corruption(folder, checksums=True)


def test_sizes_alone_do_not_read_the_files(folder):
    flip_a_bit(folder / "state.pt")
    assert find_corruption(folder) is None


@pytest.mark.parametrize(
    "write",
    [
        lambda files, tensor, path: files.save(tensor, path),
        lambda _, tensor, path: save_file(tensor, path),
        lambda _, tensor, path: torch.save(tensor, path),
        lambda _, tensor, path: path.write_bytes(bytes(tensor["big"].numel() * 4)),
    ],
    ids=["hashed", "safetensors", "torch", "plain"],
)
def test_a_full_disk_is_remembered_whoever_writes(small_disk, write):
    files = Files(small_disk)
    with files.remembering_errors():
        write(files, {"big": torch.randn(2_000_000)}, small_disk / "big")
    assert files.error
    assert not files.entries
    first = files.error
    files.save({"big": torch.randn(2_000_000)}, small_disk / "more.pt")
    assert files.error == first


def test_other_errors_are_raised(tmp_path):
    with pytest.raises(RuntimeError, match="ours"), Files(tmp_path).remembering_errors():
        raise RuntimeError("ours")
