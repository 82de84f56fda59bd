"""`~` is the home folder wherever a path is named; in a folder's name `[`, `*` and `?` are letters."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import losses, results

import generate
from neoflix.arguments.generate import parse_generate_args
from neoflix.arguments.parse import read_all_flags
from neoflix.arguments.paths import expand_paths
from neoflix.checkpoints.find import list_checkpoints
from neoflix.checkpoints.world_size import convert
from neoflix.export import export_merged, parse_export_args
from neoflix.report import parse_report_args
from neoflix.runtime.files import without_wildcards

ODD = "run [1]*? {x} ~"


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


FLAGS = ("output_dir", "cache_dir", "model_name_or_path", "dataset")


def put_everything(home: Path, model_dir: Path, catalogue: Path) -> dict:
    shutil.copytree(model_dir, home / "model")
    shutil.copy(catalogue, home / "texts.csv")
    shutil.copy("ds_configs/cpu.json", home / "ds.json")
    names = {"output_dir": "run", "cache_dir": "cache", "model_name_or_path": "model", "dataset": "texts.csv"}
    return {name: f"~/{path}" for name, path in {**names, "deepspeed": "ds.json"}.items()}


@pytest.mark.parametrize("said", ["flags", "equals", "recipe"])
def test_a_run_knows_home(home, model_dir, catalogue, said):
    flags = put_everything(home, model_dir, catalogue)
    words = {
        "flags": [word for name, path in flags.items() for word in (f"--{name.replace('_', '-')}", path)],
        "equals": [f"--{name}={path}" for name, path in flags.items()],
        "recipe": ["--config", "~/recipe.yaml"],
    }[said]
    (home / "recipe.yaml").write_text("".join(f"{name}: {path}\n" for name, path in flags.items()))
    with pytest.raises(ValueError, match=rf"--resume_from_checkpoint {home}/none: "):
        read_all_flags([*words, "--use_cpu", "true", "--resume_from_checkpoint", "~/none"])
    args = read_all_flags([*words, "--use_cpu", "true"])
    assert {name: getattr(args, name) for name in (*FLAGS, "deepspeed")} == {
        name: path.replace("~", str(home)) for name, path in flags.items()
    }


def test_other_programs_know_home(home):
    (home / "prompts.txt").write_text("A young\n")
    (home / "recipe.yaml").write_text("output_dir: ~/run\n")
    args = parse_generate_args(["--config", "~/recipe.yaml", "--output", "~/x.jsonl", "--prompt", "~/prompts.txt"])
    assert (args.model_dir, args.output) == (f"{home}/run", f"{home}/x.jsonl")
    assert args.prompt == f"{home}/prompts.txt"
    args = parse_generate_args(
        ["--model_dir", "~/run", "--judge", "~/x.jsonl", "--base_model", "~/b", "--dataset", "~/d"]
    )
    assert [args.model_dir, args.judged_file, args.base_model, args.dataset] == [
        f"{home}/{n}" for n in ("run", "x.jsonl", "b", "d")
    ]
    args = parse_export_args(["--to", "gpt2", "~/run", "~/out"])
    assert (args.run, args.out) == (f"{home}/run", f"{home}/out")
    args = parse_report_args(["~/a", "b", "--output", "~/c.html"])
    assert (args.runs, args.output) == ([f"{home}/a", "b"], f"{home}/c.html")


def test_what_is_no_path_stays(home):
    flags = {"prompt": "~ and then", "dataset": "sample", "num_samples": 3, "template": "~/{x}", "judge": True}
    assert expand_paths(flags) == flags
    assert expand_paths({"dataset": "hf:~/names:train"}) == {"dataset": f"hf:{home}/names:train"}


def test_a_run_in_a_folder_with_an_odd_name_is_resumed_sampled_and_exported(run, tmp_path):
    words = [
        *("--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2"),
        "--deepspeed",
        "ds_configs/cpu.json",
    ]
    words += ["--eval_strategy", "steps", "--eval_steps", "2", "--save_total_limit", "5"]
    whole = run("whole", *words)
    odd = run(ODD, *words)
    assert [path.name for path in list_checkpoints(odd)] == ["checkpoint-2", "checkpoint-4"]
    shutil.rmtree(odd / "checkpoint-4")
    (odd / "all_results.json").unlink()
    run(ODD, *words)
    assert losses(odd) == losses(whole)
    assert results(odd)["eval_loss"] == results(whole)["eval_loss"]
    output = tmp_path / "[samples]*.jsonl"
    generate.main(["--model_dir", str(odd), "--num_samples", "2", "--output", str(output)])
    assert len(output.read_text(encoding="utf-8").splitlines()) == 2
    export_merged(str(odd), str(tmp_path / "[out]*"))
    assert (tmp_path / "[out]*" / "model.safetensors").is_file()


def test_a_checkpoint_in_a_folder_with_an_odd_name_is_converted(run, tmp_path):
    zero = json.dumps(json.loads(Path("ds_configs/cpu.json").read_text()) | {"zero_optimization": {"stage": 2}})
    odd = run(ODD, "--max_steps", "1", "--eval_strategy", "no", "--save_strategy", "steps", "--deepspeed", zero)
    target = convert(odd / "checkpoint-1", odd / "checkpoint-1.universal")
    assert list(target.glob("*/zero/*/fp32.pt"))


def test_a_link_stands_in_for_a_folder_with_wildcards(tmp_path):
    (tmp_path / ODD / "checkpoint-1").mkdir(parents=True)
    with without_wildcards(tmp_path / ODD / "checkpoint-1") as readable:
        assert not set("*?[") & set(str(readable))
        assert readable.name == "checkpoint-1"
        assert readable.samefile(tmp_path / ODD / "checkpoint-1")
    assert not readable.exists()
    with without_wildcards(tmp_path) as readable:
        assert readable == tmp_path
