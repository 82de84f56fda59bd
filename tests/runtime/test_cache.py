"""Files of the cache: whole or not there, nothing left behind, and one sentence where the disk does not play along."""

import os
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import PYTHON, ROOT, as_examples

from neoflix.data.tokenizer import train_tokenizer
from neoflix.data.tokens import tokenize_texts
from neoflix.runtime.cache import HOST, default_cache_dir, in_cache, new_path, remove_orphans
from neoflix.runtime.errors import UserError


@pytest.mark.parametrize("is_folder", [False, True])
def test_a_path_appears_whole_or_not_at_all(tmp_path, is_folder):
    path = tmp_path / "new"

    def write(unfinished, text):
        (unfinished / "file" if is_folder else unfinished).write_text(text)

    with suppress(RuntimeError), new_path(path, is_folder) as unfinished:
        write(unfinished, "half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with new_path(path, is_folder) as unfinished:
        write(unfinished, "whole")
        assert not path.exists()
    assert list(tmp_path.iterdir()) == [path]
    assert (path / "file" if is_folder else path).read_text() == "whole"


@pytest.mark.process
def test_only_what_nobody_writes_is_removed(tmp_path):
    """A killed process leaves its file; one that runs keeps it, however old it is; another machine's waits a day."""
    hexes = "0123456789abcdef" * 2
    foreign, old, mine = (tmp_path / name for name in (f"t.other@{hexes}.part", f"old.{hexes}.part", "my.part"))
    for path in (foreign, old, mine):
        path.touch()
    os.utime(old, (0, 0))
    code = "import sys, time; from pathlib import Path; from neoflix.runtime.cache import new_path\n"
    code += f"with new_path(Path({str(tmp_path)!r}, 'tokens.arrow')):\n print('ready', flush=True)\n time.sleep(600)"
    with subprocess.Popen([PYTHON, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout.readline() == "ready\n"
        (live,) = tmp_path.glob(f"tokens.arrow.{HOST}@*.part")
        os.utime(live, (time.time() - 10**6,) * 2)
        remove_orphans(tmp_path)
        assert set(tmp_path.iterdir()) == {live, foreign, mine}
        writer.kill()
    remove_orphans(tmp_path)
    assert set(tmp_path.iterdir()) == {foreign, mine}
    os.utime(foreign, (0, 0))
    with new_path(tmp_path / "next"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"my.part", "next"}


def test_the_default_folder_is_beside_that_of_datasets(monkeypatch, tmp_path):
    from datasets import config

    for name in ("HF_DATASETS_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        assert name not in os.environ or str(config.HF_DATASETS_CACHE).startswith(os.environ[name])
    assert default_cache_dir() == Path(config.HF_DATASETS_CACHE) / "neoflix"
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "datasets" / "neoflix"


def test_a_cache_that_cannot_be_written(tmp_path, tokenizer, titles):
    (tmp_path / "file").touch()
    cache = tmp_path / "file" / "cache"
    for use in (
        lambda: tokenize_texts(as_examples(titles), tokenizer, 64, cache),
        lambda: train_tokenizer(titles, 500, cache),
    ):
        with pytest.raises(UserError, match=r"--cache_dir .*file.cache: cannot be read or written \(Not a directory\)"):
            use()
    with pytest.raises(UserError, match="Permission denied"), in_cache(cache):
        raise PermissionError(13, "no")


@pytest.mark.parametrize("small_disk", ["200k"], indirect=True)
def test_a_disk_that_is_full_while_texts_become_tokens(small_disk, tokenizer, titles):
    with pytest.raises(UserError, match="No space left on device"):
        tokenize_texts(as_examples(titles * 50), tokenizer, 256, small_disk)
    assert list(small_disk.iterdir()) == [], "what was begun is removed"
