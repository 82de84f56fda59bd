"""docs/export.md's example in a real vLLM, whose packages need an environment of their own:
`VLLM_PYTHON=/path/to/venv/bin/python make test`."""

import os
import re

import pytest
from conftest import PYTHON, ROOT, run_program

from neoflix.export import main
from neoflix.sampling.sampler import Sampler

VLLM_PYTHON = os.environ.get("VLLM_PYTHON")
SMALL = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR"}

pytestmark = pytest.mark.skipif(not VLLM_PYTHON, reason="VLLM_PYTHON names no Python with vLLM")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm") / "results"
    words = ["--config", "recipes/demo.yaml", "--max_steps", "60", "--output_dir", folder]
    run_program(PYTHON, "train.py", *words, "--num_progress_samples", "0", "--use_cpu", "true")
    main(["--to", "gpt2", str(folder), str(folder.parent / "exported")])
    return folder


@pytest.fixture
def run_example(run):
    """run_example({old: new}) -> the lines that docs/export.md's example printed, with these parts of it replaced."""
    page = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(from vllm .*?)```", page, re.DOTALL)

    def run_example(changes: dict[str, str] | None = None) -> list[str]:
        program = example
        here = {'"exported"': repr(str(run.parent / "exported")), "print(": 'print("TEXT", '}
        for old, new in (here | (changes or {})).items():
            assert old in program
            program = program.replace(old, new)
        script = run.parent / "example.py"
        script.write_text(program)
        output = run_program(VLLM_PYTHON, script, env=SMALL)
        return [line.removeprefix("TEXT ") for line in output.splitlines() if line.startswith("TEXT ")]

    return run_example


def test_the_example_writes_texts(run_example):
    lines = run_example()
    assert len(set(lines)) == 3
    assert all(line.startswith("A young") for line in lines)


def test_greedy_texts_are_this_projects(run_example, run):
    prompts = ["A young", "When the", "Two", "After a", "In the", "Her"]
    greedy = {"temperature=0.8, top_p=0.95, max_tokens=96": "temperature=0, max_tokens=24"}
    lines = run_example(greedy | {'["A young"] * 3': repr(prompts)})
    ours = Sampler.load(run, device="cpu").sample(prompts, top_k=1, max_new_tokens=24)
    assert lines == [sample.text for sample in ours]
