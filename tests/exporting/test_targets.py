"""Files that appear complete or not at all; tests/test_export.py has the checks and folders."""

import pytest

from neoflix.exporting.targets import files_appearing_whole


def test_files_appear_together(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    with files_appearing_whole(first, second) as folder:
        (folder / "a").write_text("1")
        (folder / "b").write_text("2")
        assert not first.exists()
        assert not second.exists()
    assert [path.read_text() for path in sorted(tmp_path.iterdir())] == ["1", "2"]


def test_after_an_error_there_is_none(tmp_path):
    target = tmp_path / "new" / "b"

    def fill_the_disk():
        with files_appearing_whole(target) as folder:
            (folder / "b").write_text("2")
            raise OSError(28, "No space left on device")

    with pytest.raises(ValueError, match=f"OUT {target}: cannot be written"):
        fill_the_disk()
    assert not list((tmp_path / "new").iterdir())
