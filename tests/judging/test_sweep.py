"""Sweeps: every combination of settings, its samples, figures and plot."""

import json

from conftest import generate_words, read_jsonl

import generate
from neoflix.judging.figures import judge
from neoflix.judging.novelty import TrainingTexts
from neoflix.judging.sweep import draw_sweep, sweep_header, sweep_line


def test_a_sweep_without_any_fluency_is_not_drawn(tmp_path):
    found = judge(["两年轻的厨师了"], TrainingTexts(["年轻的厨师"]), no_perplexity="none here")
    assert not draw_sweep({"top_k=1": found}, tmp_path / "sweep.png")
    assert not (tmp_path / "sweep.png").exists()
    assert len(sweep_line("top_k=1", found, 7)) == len(sweep_header(7))


def test_sweep_shows_every_combination(recorded_run, tmp_path, capsys):
    folder = tmp_path / "sweep"
    words = ("--sweep", "temperature=0.5,1.9", "top_k=0,5", "--output", folder, "--max_new_tokens", "12")
    generate.main(generate_words(recorded_run, *words))
    table = capsys.readouterr().out
    names = [f"temperature={t},top_k={k}" for t in (0.5, 1.9) for k in (0, 5)]
    assert [line.split()[0] for line in table.splitlines() if line.startswith("temperature")] == names
    kept = json.loads((folder / "sweep.json").read_text())["rows"]
    assert [row["settings"] for row in kept] == [{"temperature": t, "top_k": k} for t in (0.5, 1.9) for k in (0, 5)]
    assert all(row["samples"]["perplexity"] > 1 for row in kept)
    assert {path.name for path in folder.iterdir()} == {*(f"{n}.jsonl" for n in names), "sweep.json", "sweep.png"}
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    # A setting's samples are those that the same flags bring without a sweep.
    alone = generate_words(recorded_run, "--temperature", "1.9", "--top_k", "5", "--max_new_tokens", "12")
    generate.main([*alone, "--output", str(tmp_path / "alone.jsonl")])
    assert read_jsonl(tmp_path / "alone.jsonl") == read_jsonl(folder / f"{names[3]}.jsonl")
