"""The benchmarks run: small, for a look at what they write; whether they are fast is not a test's business."""

import json
import os
import re
import runpy
from types import SimpleNamespace

import pytest
import torch
from conftest import PYTHON, ROOT, run_program
from machine import cap_device_memory


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def run_script(tmp_path, monkeypatch):
    """run_script(name, flag, ...) -> the line that a benchmark writes, run in this process."""

    def run_script(name: str, *words: str) -> dict:
        monkeypatch.setattr("sys.argv", [name, *words, "--output", str(tmp_path / "figures.jsonl")])
        monkeypatch.syspath_prepend(ROOT / "benchmarks")  # as Python does for a script
        runpy.run_path(str(ROOT / "benchmarks" / name), run_name="__main__")
        (line,) = lines(tmp_path / "figures.jsonl")
        return line

    return run_script


@pytest.mark.slow
def test_everything_for_a_gpu_runs_dry():
    """Every line of the GPU's command but the device's own. Slow: its parts are tests of their own below."""
    no_gpu = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}  # where there is one it is not asked
    output = run_program("benchmarks/gpu.sh", env={"PYTHON": PYTHON, **no_gpu})
    assert "a dry run" in output
    assert "FAILED" not in output, output
    for heading in ("real_tokens_per_second", "texts by length", "of the limit"):
        assert heading in output
    assert re.search(r"^4 +generate_batch ", output, re.MULTILINE), output


@pytest.mark.parametrize(("gib", "fraction"), [(12, 0.5065), (24, 1.0)])
def test_a_cap_above_the_card_is_no_limit(gib, fraction, monkeypatch):
    """torch refuses a fraction above 1: this is its own check, without a device."""
    set_to = []
    whole = SimpleNamespace(total_memory=int(23.69 * 2**30))  # of a card of 24 GB
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: whole)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda.memory, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch._C, "_cuda_setMemoryFraction", lambda *given: set_to.append(given[0]), raising=False)
    cap_device_memory(gib)
    assert set_to == [pytest.approx(fraction, rel=1e-3)]


@pytest.mark.process
@pytest.mark.parametrize(
    ("script", "words", "found"),
    [
        ("operators.py", ["--num_texts", "4", "--width", "64"], ("loss", "attention")),
        (
            "generate.py",
            ["--architecture", "demo", "--turns", "1", "--max_new_tokens", "2", "--mixed_texts", "3"],
            ("1", "20"),
        ),
        ("export.py", ["--architecture", "demo", "--turns", "1", "--max_new_tokens", "2"], ("1 greedy", "20 sampled")),
    ],
)
def test_benchmarks_of_one_process(script, words, found, run_script):
    line = run_script(script, *words)
    for key in found:
        figures = line.get("batch_sizes", line.get("batches", line))[key]
        assert any(name.startswith("ours") for name in figures), figures
    assert line["command"].startswith(f"python benchmarks/{script} {words[0]}")


def test_sampling_in_int8(recorded_run, run_script):
    line = run_script("int8.py", str(recorded_run), "--texts", "2")
    for side in ("int8", "ctranslate2 int8"):
        assert line[side]["perplexity"] == pytest.approx(line["fp32"]["perplexity"], rel=0.02)
        assert line[side]["perplexity"] != line["fp32"]["perplexity"]


def test_packed_and_padded_steps(model_dir, run_script):
    texts = ["--dataset", str(ROOT / "data" / "sample_titles.csv"), "--texts", "3", "--turns", "1"]
    line = run_script("packed.py", "--model", str(model_dir), *texts)
    for way in ("all weights", "LoRA"):
        figures = line[way]
        assert figures["ratio"] == pytest.approx(figures["padded_seconds"] / figures["packed_seconds"])


@pytest.fixture
def write_in_turn(run_script):
    """write_in_turn(side, ...) -> the figures of generate.py with these sides, for 1 text and for 5 at a time."""

    def write_in_turn(*sides: str) -> dict:
        sizes = ["--turns", "1", "--max_new_tokens", "3", "--batch_sizes", "1", "5"]
        line = run_script("generate.py", "--architecture", "demo", *sizes, "--sides", *sides)
        assert list(line["batch_sizes"]) == ["1", "5"]
        return line

    return write_in_turn


@pytest.mark.process
@pytest.mark.parametrize("other", ["ours_int8", "generate_batch", "vllm"])
def test_ours_beside_other_programs(other, write_in_turn):
    """generate.py counts the tokens of each side, and ends if they are not as many as asked for."""
    if other == "vllm" and not os.environ.get("VLLM_PYTHON"):
        pytest.skip("VLLM_PYTHON names no Python with vLLM")
    line = write_in_turn("transformers", "ours", other)
    for side in line["batch_sizes"].values():
        for name in ("transformers", other):
            speeds = side["ours"]["tokens_per_second"] / side[name]["tokens_per_second"]
            assert side[name]["ratio"] == pytest.approx(speeds)
        assert "ratio" not in side["ours"]
        assert side["ratio"] == side["transformers"]["ratio"]
    assert line["parameters"] == 4_729_344, "all of them, those that are packed too"


@pytest.mark.process
def test_one_side_alone(write_in_turn):
    for side in write_in_turn("ours")["batch_sizes"].values():
        assert list(side) == ["ours"]
        assert side["ours"]["tokens_per_second"] > 0


def test_vllm_needs_a_python_of_its_own(write_in_turn, monkeypatch, capsys):
    monkeypatch.delenv("VLLM_PYTHON", raising=False)
    with pytest.raises(SystemExit) as ended:
        write_in_turn("ours", "vllm")
    assert ended.value.code == 2
    assert "VLLM_PYTHON" in capsys.readouterr().err


def test_exports_in_llama_cpp(recorded_run, run_script):
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
    line = run_script("gguf_files.py", str(recorded_run), "--texts", "2", "--prompts", "2", "--threads", "1")
    assert line["files"]["float32 exact"]["perplexity"] == pytest.approx(line["perplexity"], rel=1e-3)
    sizes = [line["files"][f"{dtype} exact"]["bytes"] for dtype in ("q8_0", "bfloat16", "float32")]
    assert sizes == sorted(sizes)


def test_judging_finds_what_was_planted(run_script):
    line = run_script("judge.py", "--samples", "200", "--texts", "300")
    assert line["found"]["copies"] >= 0.05
    assert line["found"]["near_twins"] >= 0.1
    assert line["cpu_seconds"] == pytest.approx(line["cpu_seconds_index"] + line["cpu_seconds_judge"])


@pytest.mark.process
def test_cost_of_a_manifest(tmp_path):
    run_program(
        PYTHON, "benchmarks/checkpoint.py", "--gib", "0.01", "--turns", "1", "--output", tmp_path / "line.jsonl"
    )
    (line,) = lines(tmp_path / "line.jsonl")
    assert 0.01 * 2**30 < line["bytes"] < 0.011 * 2**30
    assert min(line["seconds_without"], line["seconds_with"], line["ratio"]) >= 0


@pytest.mark.process
def test_article_and_ours_side_by_side(tmp_path):
    words = ["--architecture", "demo", "--turns", "1", "--steps", "1", "--texts_per_step", "4"]
    run_program(PYTHON, "benchmarks/train.py", *words, "--output", str(tmp_path / "train.jsonl"))
    (line,) = lines(tmp_path / "train.jsonl")
    assert line["ratio"] == line["ours"]["real_tokens_per_second"] / line["article"]["real_tokens_per_second"]
    assert line["article"]["real_tokens_per_step"] == line["ours"]["real_tokens_per_step"], "the same texts"
    assert line["article"]["parameters"] == line["ours"]["parameters"], "the same model"
    assert line["hardware"]
    assert line["versions"]["torch"] == torch.__version__
    for side in ("article", "ours"):
        phases = [line[side][f"seconds_{phase}"] for phase in ("data", "forward", "backward", "optimizer")]
        assert min(phases) > 0, "a phase that was not seen"
        assert 0 < line[side]["mfu"] < 1.5
        assert line[side]["python_share_ours"] <= line[side]["python_share_all"] < 1
    assert line["ours"]["python_share_ours"] > 0
    assert line["article"]["python_share_ours"] == 0, "the article's side runs none of our code"


@pytest.mark.slow
def test_growth_and_plots(tmp_path):
    words = ["--rows", "100", "--processes", "2", "--steps", "2", "--output", str(tmp_path / "growth.jsonl")]
    run_program(PYTHON, "benchmarks/growth.py", *words)
    found = lines(tmp_path / "growth.jsonl")
    assert [(line["rows"], line["processes"], line["cache"]) for line in found] == [
        (100, 1, "cold"),
        (100, 1, "warm"),
        (10_000, 2, "warm"),
    ]
    for line in found:
        assert line["start_up_seconds"] == pytest.approx(sum(line["start_up"].values()))
        assert line["start_up"]["other"] < line["start_up_seconds"] / 2, "most of the start has a name"
    run_program(PYTHON, "benchmarks/plots.py", str(tmp_path))
    assert (tmp_path / "growth.png").stat().st_size > 10_000


def test_committed_results_say_where_they_come_from():
    for path in (ROOT / "benchmarks" / "results").glob("*.jsonl"):
        for line in lines(path):
            assert {"benchmark", "command", "hardware", "versions", "date"} <= line.keys(), path
