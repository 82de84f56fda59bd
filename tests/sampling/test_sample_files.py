"""Files of samples: whose they are, and that one process at a time writes one."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from neoflix.judging.judge import Judge
from neoflix.sampling.sample_files import describe_job, find_done, save_samples


@dataclass
class Sample:
    text: str

    def to_dict(self) -> dict:
        return {"text": self.text}


@pytest.fixture
def path(tmp_path) -> str:
    return str(tmp_path / "samples.jsonl")


JOB = {"model": "1", "prompts": "2", "seed": 42}
TEXTS = [Sample("one\u2028line"), Sample("two"), Sample("three")]


def write(path: str, num: int, job: dict = JOB, done: int = 0):
    """A writer that has written `num` samples of three and waits."""
    writer = save_samples(iter(TEXTS[done:]), path, job, 3, done, quiet=True)
    for _ in range(num):
        next(writer)
    return writer


def test_files_that_are_not_the_models_do_not_change_the_job(model_dir, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(model_dir, folder)
    before = describe_job(folder, [""])
    for name in ("samples.judged.json", "all_results.json", "run_files.json", "style.safetensors", "training_args.bin"):
        (folder / name).write_text("{}")
    assert describe_job(folder, [""]) == before
    for name in ("model.safetensors", "generation_config.json", "tokenizer.json"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content + b" ")
        assert describe_job(folder, [""]) != before, name
        (folder / name).unlink()
        shutil.copy2(model_dir / name, folder / name)
        before = describe_job(folder, [""])


def test_shards_are_part_of_the_model(tmp_path):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    before = describe_job(tmp_path, [""])
    (tmp_path / "model-00002-of-00002.safetensors").write_text("")
    assert describe_job(tmp_path, [""]) != before


def test_an_interrupted_file_is_gone_on_with(path):
    write(path, 2).close()
    with open(path, "a") as file:
        file.write('{"text": "tor')
    done = find_done(path, JOB)
    assert done == 2
    assert list(write(path, 0, done=done)) == TEXTS[2:]
    assert [json.loads(line)["text"] for line in Path(path).read_text().strip().split("\n")] == [
        text.text for text in TEXTS
    ]
    assert [each.name for each in Path(path).parent.iterdir()] == ["samples.jsonl"]


def test_two_processes_do_not_write_one_file(path):
    writer = write(path, 1)
    with pytest.raises(ValueError, match=r"another process is writing it \(process"):
        find_done(path, JOB)
    with pytest.raises(ValueError, match="another process is writing it"):
        write(path, 1)
    written = Path(path).read_text()
    writer.close()
    assert Path(path).read_text() == written
    assert find_done(path, JOB) == 1


def test_one_that_read_before_another_wrote_is_refused(path):
    done = find_done(path, JOB)
    write(path, 1).close()
    with pytest.raises(ValueError, match="another process has written to it meanwhile"):
        write(path, 1, done=done)
    assert len(Path(path).read_text().strip().split("\n")) == 1


@pytest.mark.parametrize("suffix", [".job", ".lock"])
def test_a_users_file_of_such_a_name_is_left_alone(path, suffix):
    Path(path + suffix).write_text('{"mine": true}')
    with pytest.raises(ValueError, match=r"is not a .*file of this program"):
        find_done(path, JOB)
    assert Path(path + suffix).read_text() == '{"mine": true}'


def test_a_folder_that_is_not_there_is_a_sentence(path):
    with pytest.raises(ValueError, match=r"--output .*: cannot be written"):
        find_done(str(Path(path).parent / "none" / "x.jsonl"), JOB)


def test_a_users_judged_file_is_left_alone(path):
    judged = Path(path).with_suffix(".judged.json")
    judged.write_text('{"mine": true}')
    with pytest.raises(ValueError, match="is not a file that neoflix wrote"):
        Judge.report(None, [{"text": "a"}], path)  # before anything is judged
    assert judged.read_text() == '{"mine": true}'
