import json
import math
import os
import stat

import pytest
import xxhash

from neoflix.runtime import files
from neoflix.runtime.files import (
    ROOT,
    HashedFile,
    apply_umask,
    free_bytes,
    hash_file,
    read_json,
    without_wildcards,
    write_json,
    write_text,
)


def test_a_file_is_written_completely_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_text(path, "first")

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space left"):
            write_text(path, "second")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_json_has_no_nan(tmp_path):
    write_json(tmp_path / "a.json", {"a": [1.5, math.nan, {"b": math.inf}], "c": (-math.inf, "NaN")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1.5, None, {"b": None}], "c": [None, "NaN"]}


def test_json_of_another_kind_is_the_default(tmp_path):
    path = tmp_path / "a.json"
    assert read_json(path, {}) == {}
    for content, found in (('{"a": 1}', {"a": 1}), ("[1]", {}), ("{", {}), ("", {})):
        path.write_text(content)
        assert read_json(path, {}) == found


def test_hashes_are_those_of_the_content(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK", 4)
    content = b"more than two blocks"
    file = HashedFile(tmp_path / "a")
    file.write(content[:7])
    file.write(content[7:])
    file.flush()
    file.close()
    entry = {"bytes": len(content), "xxh3_128": xxhash.xxh3_128(content).hexdigest()}
    assert file.entry() == entry == hash_file(tmp_path / "a") == hash_file(tmp_path / "a", sync=True)
    assert (tmp_path / "a").read_bytes() == content


def test_permissions_are_those_of_the_umask(tmp_path):
    (tmp_path / "a").touch(mode=0o600)
    (tmp_path / "folder").mkdir(mode=0o700)
    before = os.umask(0o027)
    try:
        apply_umask([tmp_path / "a", tmp_path / "folder"])
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o750


def test_paths_with_wildcards_are_linked(tmp_path):
    folder = tmp_path / "a[1]*"
    folder.mkdir()
    (folder / "file").touch()
    with without_wildcards(folder) as path:
        assert not set("*?[") & set(path.name)
        assert (path / "file").is_file()
    assert not path.exists()
    assert folder.is_dir()
    for plain in (tmp_path, None):
        with without_wildcards(plain) as path:
            assert path == plain


def test_free_space_of_a_folder_that_does_not_exist_yet(tmp_path):
    assert free_bytes(tmp_path / "a" / "b") == pytest.approx(free_bytes(tmp_path), rel=0.1)


def test_the_root_is_the_project():
    assert (ROOT / "train.py").is_file()
