"""`generate.py` from its command line to its files."""

import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import PYTHON, ROOT, read_jsonl

import generate
from neoflix.runtime.console import printable
from neoflix.runtime.errors import UserError


def test_jsonl_has_the_promised_columns(run_dir, tmp_path):
    output = tmp_path / "samples.jsonl"
    words = ["--model_dir", str(run_dir), "--num_samples", "5", "--seed", "3", "--prompt", "A young "]
    generate.main([*words, "--output", str(output), "--max_new_tokens", "40"])
    rows = read_jsonl(output)
    assert len(rows) == 5
    for row in rows:
        assert list(row) == ["text", "prompt", "seed", "num_tokens", "finish_reason"]
        assert (row["prompt"], row["seed"]) == ("A young", 3)
        assert row["text"].startswith("A young")
        assert row["finish_reason"] == ("length" if row["num_tokens"] == 40 else "eos")
    before = output.read_bytes()
    with pytest.raises(UserError, match=f"--output {output}: exists already"):
        generate.main([*words, "--output", str(output)])
    assert output.read_bytes() == before


def test_prompts_from_a_file(run_dir, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("A young\n\nTwo brothers\n")
    generate.main(["--model_dir", str(run_dir), "--num_samples", "2", "--prompt", str(prompts)])
    lines = capsys.readouterr().out.splitlines()
    assert [line[5:].startswith(p) for line, p in zip(lines, ["A", "A", "T", "T"], strict=True)] == [True] * 4
    prompts.write_text("\n \n")
    with pytest.raises(UserError, match=f"{prompts}: .*no line with text"):
        generate.main(["--model_dir", str(run_dir), "--prompt", str(prompts)])


@pytest.mark.parametrize(
    ("words", "fact"),
    [
        (["--model_dir", "none"], "--model_dir none: no such folder"),
        (["--model_dir", "{empty}"], "--model_dir {empty}: holds no model and no complete checkpoint"),
        (
            ["--model_dir", "{run}", "--output", "{empty}/none/x.jsonl"],
            "--output {empty}/none/x.jsonl: cannot be written",
        ),
        (["--model_dir", "{run}", "--prompt", "word " * 300, "--output", "{empty}/x.jsonl"], "leave no room"),
    ],
    ids=["no folder", "no model", "no folder for the file", "no room"],
)
def test_wrong_words_write_nothing(run_dir, tmp_path, words, fact):
    words = [word.replace("{empty}", str(tmp_path)).replace("{run}", str(run_dir)) for word in words]
    with pytest.raises(UserError, match=re.escape(fact.replace("{empty}", str(tmp_path)))):
        generate.main(words)
    assert list(tmp_path.iterdir()) == []


def test_stream_prints_each_text_as_it_is_written(run_dir, tmp_path, capsys):
    words = ["--model_dir", str(run_dir), "--num_samples", "3", "--seed", "3", "--prompt", "A young"]
    generate.main([*words, "--output", str(tmp_path / "x.jsonl")])
    capsys.readouterr()
    texts = [row["text"] for row in read_jsonl(tmp_path / "x.jsonl")]
    generate.main([*words, "--stream"])
    printed = capsys.readouterr().out
    assert "".join(printed.split()) == "".join(printable("".join(texts)).split())


@pytest.fixture
def long_job(run_dir, tmp_path) -> tuple[list[str], Path]:
    """Words of a command that writes 600 texts, and its file."""
    output = tmp_path / "samples.jsonl"
    words = [PYTHON, "generate.py", "--model_dir", str(run_dir), "--num_samples", "600", "--max_new_tokens", "60"]
    return [*words, "--temperature", "1.0", "--output", str(output)], output


def test_killed_and_started_again(long_job):
    """The same file as without the kill, which left half a line. No other job continues it."""
    words, output = long_job
    program = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.DEVNULL)
    while not output.exists() or output.read_bytes().count(b"\n") < 40:
        assert program.poll() is None
        time.sleep(0.05)
    program.send_signal(signal.SIGKILL)
    program.wait()
    written = output.read_bytes()
    assert written.count(b"\n") < 600
    output.write_bytes(written[: written.rfind(b"\n") + 1] + b'{"text": "A yo')

    arguments = words[2:]
    with pytest.raises(UserError, match=r"was started with other temperature \(1\.0, now 0\.9\)"):
        generate.main([*arguments, "--temperature", "0.9"])
    with pytest.raises(UserError, match="was started with other prompts"):
        generate.main([*arguments, "--prompt", "Two"])
    generate.main(arguments)
    again = output.read_bytes()
    output.unlink()
    generate.main(arguments)
    assert again == output.read_bytes()
    assert again.startswith(written[: written.rfind(b"\n") + 1])
    assert again.count(b"\n") == 600
    assert sorted(path.name for path in output.parent.iterdir()) == [output.name]
    with pytest.raises(UserError, match=f"--output {output}: exists already"):
        generate.main(arguments)


def test_a_reader_that_closes_the_pipe(long_job):
    """`generate.py | head -1` ends by itself, quietly."""
    words, _ = long_job
    program = subprocess.Popen(words[:-2], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert program.stdout.readline().startswith("  1. ")
    program.stdout.close()
    complaints = program.stderr.read()
    assert program.wait(120) == 128 + signal.SIGPIPE
    assert "Error" not in complaints
    program.stderr.close()


def test_a_model_without_a_tokenizer(run_dir, tmp_path):
    """transformers would build an empty one, and every text would be empty."""
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((run_dir / name).read_bytes())
    with pytest.raises(UserError, match=rf"--model_dir {tmp_path}: has no tokenizer"):
        generate.main(["--model_dir", str(tmp_path)])
