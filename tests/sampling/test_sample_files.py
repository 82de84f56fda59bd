"""Files of samples: whose they are, and that one process at a time writes one."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from neoflix.sampling.sample_files import SampleFile, describe_job


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


def write(file: SampleFile, num: int):
    """A writer that has written `num` samples of three and waits."""
    writer = file.append(iter(TEXTS[file.num_done :]))
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
    write(SampleFile(path, JOB, 3, quiet=True), 2).close()
    with open(path, "a") as file:
        file.write('{"text": "tor')
    again = SampleFile(path, JOB, 3, quiet=True)
    assert again.num_done == 2
    assert list(write(again, 0)) == TEXTS[2:]
    assert [json.loads(line)["text"] for line in Path(path).read_text().strip().split("\n")] == [
        text.text for text in TEXTS
    ]
    assert [each.name for each in Path(path).parent.iterdir()] == ["samples.jsonl"]


def test_two_processes_do_not_write_one_file(path):
    file, other = SampleFile(path, JOB, 3, quiet=True), SampleFile(path, JOB, 3, quiet=True)
    writer = write(file, 1)
    with pytest.raises(ValueError, match=r"--output .*samples.jsonl: .*\(process \d+ on "):
        SampleFile(path, JOB, 3, quiet=True)
    with pytest.raises(ValueError, match=r"--output .*samples.jsonl: .*\(process \d+ on "):
        write(other, 1)
    written = Path(path).read_text()
    writer.close()
    assert Path(path).read_text() == written
    assert SampleFile(path, JOB, 3, quiet=True).num_done == 1


def test_one_that_read_before_another_wrote_is_refused(path):
    file = SampleFile(path, JOB, 3, quiet=True)
    write(SampleFile(path, JOB, 3, quiet=True), 1).close()
    with pytest.raises(ValueError, match="another process has written to it"):
        write(file, 1)
    assert len(Path(path).read_text().strip().split("\n")) == 1


@pytest.mark.parametrize("suffix", [".job", ".lock"])
def test_a_users_file_of_such_a_name_is_left_alone(path, suffix):
    Path(path + suffix).write_text('{"mine": true}')
    with pytest.raises(ValueError, match=rf"samples\.jsonl{suffix}\b.* move it away"):
        SampleFile(path, JOB, 3, quiet=True)
    assert Path(path + suffix).read_text() == '{"mine": true}'


def test_a_folder_that_is_not_there_is_a_sentence(path):
    with pytest.raises(ValueError, match=r"--output .*none/x.jsonl: .*No such file"):
        SampleFile(str(Path(path).parent / "none" / "x.jsonl"), JOB, 3)


def test_another_job_is_refused_with_what_differs(path):
    write(SampleFile(path, JOB, 3, quiet=True), 1).close()
    for job, said in ((JOB | {"seed": 7}, r"seed \(42, now 7\)"), (JOB | {"model": "9"}, "other model")):
        with pytest.raises(ValueError, match=said):
            SampleFile(path, job, 3)
