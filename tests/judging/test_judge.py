"""Samples are judged against the texts that their run was trained on."""

import json
import re
import shutil

import pytest
from conftest import as_examples, generate_words, read_jsonl

import generate
from neoflix.arguments.generate import parse_generate_args
from neoflix.checkpoints.start import find_start
from neoflix.data.split import split_texts
from neoflix.judging.base_model import BaseModel
from neoflix.judging.judge import Judge, read_training_texts
from neoflix.runtime.errors import UserError


def train_side(texts: list[str], validation_fraction: float) -> list[str]:
    return [example.completion for example in split_texts(as_examples(texts), validation_fraction).train]


def test_training_texts_are_the_runs_own_side(recorded_run, titles, tmp_path):
    def read(*words):
        return read_training_texts(parse_generate_args(list(map(str, words))))

    assert read("--model_dir", recorded_run) == train_side(titles[:100], 0.2)
    (recorded_run / "checkpoint-3").mkdir(exist_ok=True)
    assert read("--model_dir", recorded_run / "checkpoint-3") == train_side(titles[:100], 0.2)
    other = ("--dataset", "sample", "--text_column", "description")
    assert read("--model_dir", recorded_run, *other) == train_side(titles, 0.2)
    assert read("--model_dir", tmp_path, *other) == train_side(titles, 0.1)
    assert read("--model_dir", tmp_path, "--dataset", "sample", "--validation_fraction", 0) == titles


def test_a_data_set_that_lies_elsewhere_is_the_same_run(recorded_run, model_dir, tmp_path):
    run = json.loads((recorded_run / "run.json").read_text())
    moved = run | {"texts": run["texts"] | {"dataset": "/elsewhere.jsonl"}}
    assert find_start(str(recorded_run), None, moved, None).is_finished
    assert not find_start(str(tmp_path), None, run, None).is_finished
    with pytest.raises(UserError, match="choose another --output_dir"):
        find_start(str(recorded_run), None, run | {"data": "other"}, None)


def test_samples_just_made_are_judged_beside_their_file(recorded_run, model_dir, titles, tmp_path, capsys):
    output = tmp_path / "samples.jsonl"
    generate.main(generate_words(recorded_run, "--judge", "--output", output))
    table = capsys.readouterr().out
    judged = json.loads((tmp_path / "samples.judged.json").read_text())
    rows = read_jsonl(output)
    assert judged["samples"]["num_texts"] == judged["texts"]["num_texts"] == len(rows) == 4
    assert judged["num_training_texts"] == len(train_side(titles[:100], 0.2))
    assert judged["base_model"] == str(model_dir)
    base = BaseModel.load(str(model_dir))
    assert judged["samples"]["perplexity"] == pytest.approx(base.perplexity([row["text"] for row in rows]))
    assert f"perplexity under {model_dir}" in table
    assert re.search(r"novel \(neither\) +100\.0%", table)

    # The same from the file, without a model.
    (tmp_path / "samples.judged.json").unlink()
    generate.main(["--model_dir", str(recorded_run), "--judge", str(output)])
    again = json.loads((tmp_path / "samples.judged.json").read_text())
    assert "not measured: " in capsys.readouterr().out
    assert again["samples"]["perplexity"] is None
    for key in judged.keys() - {"samples", "texts", "base_model", "no_perplexity"}:
        assert again[key] == judged[key], key


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("", "the file is empty"),
        ("\n{broken\n", "line 2 is not valid JSON"),
        ('{"text": "a"}\n["a"]\n', "line 2 is neither a JSON object"),
        ('{"text": 3}\n', "row 1 has no text"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_files_that_hold_no_samples(recorded_run, tmp_path, content, message):
    path = tmp_path / "samples.jsonl"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        generate.main(["--model_dir", str(recorded_run), "--judge", str(path)])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "samples.judged.json").exists()


def test_texts_that_no_one_names_or_that_have_changed(recorded_run, model_dir, tmp_path):
    with pytest.raises(ValueError, match=r"--model_dir .*--dataset"):
        generate.main(["--model_dir", str(model_dir), "--judge"])
    changed = shutil.copytree(recorded_run, tmp_path / "run")
    run = json.loads((changed / "run.json").read_text())
    run["num_training_texts"] += 1
    (changed / "run.json").write_text(json.dumps(run))
    with pytest.raises(ValueError, match=r"titles\.jsonl: has changed"):
        generate.main(["--model_dir", str(changed), "--judge"])


def test_a_users_judged_file_is_left_alone(tmp_path):
    judged = tmp_path / "samples.judged.json"
    judged.write_text('{"mine": true}')
    with pytest.raises(ValueError, match=r"samples\.judged\.json: is not a file that neoflix wrote"):
        Judge.report(None, [{"text": "a"}], str(tmp_path / "samples.jsonl"))  # before anything is judged
    assert judged.read_text() == '{"mine": true}'
