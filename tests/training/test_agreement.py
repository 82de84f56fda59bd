"""All processes must run the same code on the same data."""

import pytest
from conftest import ROOT
from forked import launch


@pytest.mark.process
def test_processes_with_other_texts_are_refused(train_words, tmp_path, catalogue):
    """Each process reads the file that lies at a path of its own, as on nodes without a common disk."""
    other = tmp_path / "other.csv"
    other.write_text(catalogue.read_text() + "One more,A text that the others have not.\n")
    program = tmp_path / "train_apart.py"
    program.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "words = [word for word in sys.argv[1:] if not word.startswith('--local_rank')]\n"
        f"words += ['--dataset', {str(other)!r}] if os.environ['RANK'] == '1' else []\n"
        "import train\n"
        "from neoflix.runtime.processes import run_and_exit\n"
        "run_and_exit(lambda: train.main(words))\n"
    )
    output = launch(2, program, *train_words, "--deepspeed", "ds_configs/cpu.json", expect=2)
    assert "process 1 has other texts than process 0" in output
