"""What the tests stand on: a small GPT-Neo of true architecture in a folder, a catalogue, and ways to run."""

import argparse
import atexit
import csv
import functools
import gc
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read at import; no test waits for a network
if "PYTEST_XDIST_WORKER" not in os.environ:  # an empty cache, shared by xdist's workers: the user's may be stale
    os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="neoflix-tests-")
    atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

import cpuinfo
import pytest
import torch
from datasets import Dataset
from fake_machine import build_nvml, describe_gpus, describe_machine
from safetensors.torch import load_file
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2TokenizerFast,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedTokenizerBase,
)

from neoflix.arguments.deepspeed_file import read_ds_config
from neoflix.arguments.parse import read_all_flags
from neoflix.arguments.reader import DEFAULTS, read_train_flags
from neoflix.arguments.sampling import SAMPLING_DEFAULTS
from neoflix.arguments.training import TrainArguments
from neoflix.checkpoints.find import list_checkpoints
from neoflix.checkpoints.manifest import write_manifest
from neoflix.checkpoints.names import LIST_FILE
from neoflix.checkpoints.ownership import read_list
from neoflix.checkpoints.run_folder import claim
from neoflix.data.template import Example
from neoflix.data.tokenizer import load_tokenizer
from neoflix.data.tokens import tokenize_split, tokenize_texts
from neoflix.model.load import load_model
from neoflix.model.shape import Shape, read_shape
from neoflix.planning.forecast import Plan, forecast
from neoflix.planning.lengths import Texts
from neoflix.planning.settings import read_settings
from neoflix.reporting.history import Record
from neoflix.runtime.environment import prepare_environment
from neoflix.runtime.hardware import Machine

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
DEEPSPEED = str(Path(PYTHON).with_name("deepspeed"))
LINEAR = torch.nn.functional.linear
ON_CPU = ["--deepspeed", "ds_configs/cpu.json"]

# DeepSpeed asks for each optimizer, and each time a process looks for the answer for a second.
cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
# Small matrices: threads that wait for each other cost more than they bring.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


# Fixtures that start a process, or train.
STARTERS = {"run", "finished_run", "small_disk", "demo_args", "trained"}
# DeepSpeed asks these programs about the machine, once.
ASKED = {"c++", "g++", "gcc", "ninja", "numactl", "file", "uname"}


def pytest_itemcollected(item):
    """Marks tests that start a process by a shared fixture. Tests that share a fixture of their file, or a GPU, share a
    worker; tests of whole runs do not."""
    is_run = "runs" in item.path.parts
    if is_run or STARTERS & set(item.fixturenames):
        item.add_marker(pytest.mark.process)
    definitions = [each[-1] for each in item._fixtureinfo.name2fixturedefs.values()]
    if item.get_closest_marker("gpu"):
        item.add_marker(pytest.mark.xdist_group("gpu"))
    elif any(each.scope == "module" for each in definitions) and not (is_run or item.get_closest_marker("xdist_group")):
        item.add_marker(pytest.mark.xdist_group(item.path.stem))


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: "runs" not in item.path.parts)  # the longest first: no worker is left with them
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


def pytest_collection_finish():
    gc.collect()
    gc.freeze()  # what is imported by now: each run collects, and would look at all of it


@pytest.fixture(autouse=True)
def runs_draw_nothing(request, monkeypatch):
    """Six drawings at each run's end take longer than its training; only tests of reports look at them."""
    if request.path.parent.name != "reporting":
        monkeypatch.setattr("neoflix.reporting.curves.draw", lambda *_, **__: None)


@pytest.fixture(autouse=True)
def starts_what_its_mark_says(request, monkeypatch):
    """Under `make check` a test without the mark `process` may not start one, nor train."""
    if "not process" not in request.config.option.markexpr:
        return
    start = subprocess.Popen.__init__

    def check_and_start(self, args, *more, **options):
        program = Path(args[0] if isinstance(args, list | tuple) else args).name
        assert program in ASKED, f"starts {program}: mark the test `process`"
        start(self, args, *more, **options)

    monkeypatch.setattr(subprocess.Popen, "__init__", check_and_start)
    for name in ("neoflix.training.trainer.TokenTrainer.train", "forked.start"):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("trains or starts a program: mark the test `process`"))


@pytest.fixture(autouse=True)
def zero_3_ends_with_its_test():
    """Undoes what a ZeRO-3 run leaves behind: transformers shards each new model, and DeepSpeed replaces `linear`."""
    yield
    torch.nn.functional.linear = LINEAR
    if module := sys.modules.get("transformers.integrations.deepspeed"):
        module.unset_hf_deepspeed_config()


@pytest.fixture(autouse=True)
def no_run_by_default(monkeypatch):
    """A plan depends on the run in its folder, and ./launch.sh may have left one in results/."""
    monkeypatch.setitem(DEFAULTS, "output_dir", "no-run")


def parse_train_args(words: list[str]) -> TrainArguments:
    """The arguments of a run by its command line, without its plan."""
    flags = read_all_flags(words)
    if flags.eval_only:
        return TrainArguments.from_flags(flags)
    from neoflix.training.deepspeed import connect  # seconds

    return connect(flags)


@pytest.fixture
def demo_flags(tmp_path):
    """demo_flags("--seed", "7"): the checked flags of recipes/demo.yaml with these words."""
    prepare_environment()
    words = [
        "--config",
        str(ROOT / "recipes" / "demo.yaml"),
        "--output_dir",
        str(tmp_path / "run"),
        "--use_cpu",
        "true",
    ]
    return lambda *more: read_all_flags([*words, *more])


@pytest.fixture
def demo_args(demo_flags):
    """demo_args("--seed", "7"): the arguments of recipes/demo.yaml with these words."""
    from neoflix.training.deepspeed import connect  # seconds

    return lambda *more: connect(demo_flags(*more))


# ---- plans -----------------------------------------------------------------------------------------------------------

GIB = 2**30
NETFLIX = Texts(7008, 779, 31.8, 4.4, 64, "given")


def shape_of(size: str) -> Shape:
    """The shape of GPT-Neo "125M", "1.3B" or "2.7B"."""
    return read_shape(f"EleutherAI/gpt-neo-{size}")


def card(gib: float, host: float = 512, **more) -> Machine:
    """A node with GPUs of so many GiB, and as much disk as needed."""
    values = {"num_devices": 1, "device_name": "a card", "capability": (8, 0)} | more
    return Machine(int(host * GIB), None, 16, device_memory=int(gib * GIB), **values)


def plan_flags(*words: str) -> argparse.Namespace:
    return read_train_flags(["--plan", *words])


def forecast_of(size: str, machine: Machine, *words: str, deepspeed: str = "ds_config.json") -> Plan:
    """The plan of GPT-Neo on Netflix descriptions by these flags."""
    flags, shape = plan_flags("--deepspeed", deepspeed, *words), shape_of(size)
    settings = read_settings(flags, shape, NETFLIX, machine, read_ds_config(flags.deepspeed))
    return forecast(shape, NETFLIX, settings, machine)


@pytest.fixture
def processes(monkeypatch):
    """processes(8) makes a plan believe in 8 processes, on one node or as many per node as given."""

    def set_processes(total: int, on_a_node: int | None = None) -> None:
        monkeypatch.setenv("WORLD_SIZE", str(total))
        monkeypatch.setenv("LOCAL_SIZE", str(on_a_node or total))

    set_processes(1)
    return set_processes


# ---- other machines --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def nvml(tmp_path_factory) -> Path:
    """A folder with a library of NVIDIA's driver for GPUs that are not here."""
    return build_nvml(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def machine_of(nvml, tmp_path):
    """machine_of(RTX_3090, host_gib=30) -> environment variables with which a program finds this machine."""
    folder = tmp_path / "machine"

    def describe(*gpus: str, driver: str = "580.95.05", **more) -> dict[str, str]:
        folder.mkdir(exist_ok=True)
        return describe_gpus(nvml, *gpus, driver=driver) | describe_machine(folder, **more)

    return describe


# ---- runs ------------------------------------------------------------------------------------------------------------


def _ports():
    """1,000 ports for each of xdist's workers, none of those that the system hands out, from a random one on."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    begin = 10_000 + 1000 * (worker % 10)
    for number in itertools.count(random.SystemRandom().randrange(1000)):
        yield begin + number % 1000


_candidates = _ports()


def free_port() -> str:
    """A port that nothing listens at, and that no other test takes before this one's program does."""
    for port in _candidates:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return str(port)


@pytest.fixture(scope="session")
def titles() -> list[str]:
    with open(ROOT / "data" / "sample_titles.csv", encoding="utf-8", newline="") as file:
        return [row["description"] for row in csv.DictReader(file)]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory, titles) -> Path:
    """A folder as the hub has it: GPT-Neo weights, and a tokenizer whose only control token is <|endoftext|>."""
    folder = tmp_path_factory.mktemp("gpt-neo-tiny")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(titles, 500, show_progress=False, special_tokens=["<|endoftext|>"])
    bpe.save_model(str(folder))
    tokenizer = GPT2TokenizerFast.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    GPTNeoForCausalLM(tiny_config(vocab_size=len(tokenizer))).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def run_dir(model_dir, tmp_path_factory) -> Path:
    """A model's folder as a finished run leaves it; it is only read."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = load_tokenizer(str(model_dir))
    torch.manual_seed(0)
    sampling = SAMPLING_DEFAULTS | {"max_new_tokens": 24}
    load_model(str(model_dir), tokenizer, torch.float32, sampling).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def recorded_run(model_dir, titles, tmp_path_factory) -> Path:
    """A run's folder with the record that train.py writes, without the training; it is only read."""
    from neoflix.checkpoints.runs import describe_run, save_results, save_run
    from neoflix.data.sources import read_dataset
    from neoflix.data.split import split_texts

    folder = tmp_path_factory.mktemp("recorded")
    table = folder / "titles.jsonl"
    table.write_text("".join(json.dumps({"plot": text}) + "\n" for text in titles[:100]))
    prepare_environment()
    words = ["--use_cpu", "true", "--deepspeed", str(ROOT / "ds_configs" / "cpu.json"), "--validation_fraction", "0.2"]
    words += ["--model_name_or_path", str(model_dir), "--dataset", str(table), "--text_column", "plot"]
    args = parse_train_args([*words, "--output_dir", str(folder / "run")])
    texts, tokenizer = split_texts(read_dataset(args), 0.2), load_tokenizer(str(model_dir))
    torch.manual_seed(0)
    model = load_model(str(model_dir), tokenizer, torch.float32, SAMPLING_DEFAULTS | {"max_new_tokens": 24})
    run = describe_run(args, model, tokenizer, *tokenize_split(texts, tokenizer, 256, folder / "cache"))
    model.save_pretrained(folder / "run")
    tokenizer.save_pretrained(folder / "run")
    save_run(folder / "run", run)
    save_results(folder / "run", {})
    return folder / "run"


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, titles, model_dir) -> Path:
    """A finished run of two epochs with its report; its folder is only read."""
    import train

    folder = tmp_path_factory.mktemp("finished")
    rows = [{"description": text} for text in titles[:60]]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train.main(
        [
            *("--model_name_or_path", str(model_dir), "--dataset", str(folder / "texts.jsonl")),
            *("--output_dir", str(folder / "run"), "--cache_dir", str(folder / "cache"), "--use_cpu", "true"),
            *("--per_device_train_batch_size", "8", "--learning_rate", "1e-3", "--logging_steps", "1"),
            *("--report_to", "none", "--disable_tqdm", "true", "--num_train_epochs", "2", "--eval_strategy", "steps"),
            *("--eval_steps", "2", "--deepspeed", str(ROOT / "ds_configs" / "cpu.json")),
        ]
    )
    return folder / "run"


def make_record(training: list[float], held_out: list[float], finished=True, max_steps=None, **facts) -> Record:
    """A run that evaluates before training and after each ten steps, and logs in their middle."""
    log = [
        {"step": 10 * n, "epoch": n, "eval_loss": x, "eval_perplexity": 2**x, "eval_bits_per_char": x}
        for n, x in enumerate(held_out)
    ]
    log += [{"step": 10 * n + 5, "loss": x, "skipped_steps": facts.get("skipped", 0)} for n, x in enumerate(training)]
    step = 10 * max(len(held_out) - 1, 0)
    state = {"log_history": log, "global_step": step, "max_steps": max_steps or step}
    best = min(log[1 : len(held_out)], key=lambda line: line["eval_loss"], default={"step": 0})["step"]
    run = {"num_training_texts": facts.get("texts", 5000), "model": facts.get("model", "EleutherAI/gpt-neo-125M")}
    starts = [{"num_validation_texts": facts.get("held", 500)}]
    return Record(Path("run"), run, starts, state, {"saved_step": best} if finished else {}, [])


def generate_words(run: Path, *words) -> list[str]:
    """Words of a generate.py command for four texts of a run's model."""
    return ["--model_dir", str(run), "--num_samples", "4", "--seed", "3", *map(str, words)]


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def random_texts(num: int, num_words: int, seed: int) -> list[list[str]]:
    """Texts of few different words, as their words, so that runs of words come again."""
    draw = random.Random(seed)
    return [[f"w{draw.randrange(num_words)}" for _ in range(draw.randrange(0, 14))] for _ in range(num)]


def as_examples(texts: list[str]) -> list[Example]:
    """Texts without prompts, as they are read from a file."""
    return [Example("", text) for text in texts]


@pytest.fixture(scope="module")
def tokenizer(model_dir) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(model_dir))


@pytest.fixture
def model(model_dir, tokenizer) -> GPTNeoForCausalLM:
    """A GPT-Neo as it is loaded for training."""
    return load_model(str(model_dir), tokenizer, torch.float32, SAMPLING_DEFAULTS)


@pytest.fixture
def tokens(titles, tokenizer, tmp_path) -> Dataset:
    """The tokens of 40 texts."""
    return tokenize_texts(as_examples(titles[:40]), tokenizer, 256, tmp_path).dataset


def tiny_config(**overrides) -> GPTNeoConfig:
    """Two global and two local layers, a window of 16 tokens, no dropout."""
    values = {
        "vocab_size": 500,
        "hidden_size": 32,
        "num_layers": 4,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 2]],
        "max_position_embeddings": 256,
        "window_size": 16,
        "embed_dropout": 0.0,
        "resid_dropout": 0.0,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        # GPT-Neo's own 0.02 makes a small untrained model so flat that errors in attention hide in rounding.
        "initializer_range": 0.2,
    }
    return GPTNeoConfig(**(values | overrides))


LLAMA = LlamaConfig(
    vocab_size=512,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=160,
    max_position_embeddings=128,
    tie_word_embeddings=True,
)
OTHERS = {
    "llama": LLAMA,
    "llama-untied": LlamaConfig(**(LLAMA.to_dict() | {"tie_word_embeddings": False})),
    "gpt2": GPT2Config(vocab_size=512, n_embd=64, n_layer=3, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=0),
    "gpt-neox": GPTNeoXConfig(
        vocab_size=512, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256
    ),
}


@pytest.fixture(params=OTHERS)
def other_architecture(request, tmp_path):
    """(a small model of another architecture, its shape by config.json)"""
    config = OTHERS[request.param]
    config.save_pretrained(tmp_path)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32), read_shape(str(tmp_path))


@pytest.fixture
def catalogue(tmp_path, titles) -> Path:
    """A CSV with 60 texts."""
    path = tmp_path / "catalogue.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["title", "description"])
        writer.writerows([f"Title {i}", text] for i, text in enumerate(titles[:60]))
    return path


@pytest.fixture
def train_words(model_dir, catalogue, tmp_path) -> list[str]:
    """Flags of a run that takes seconds: fp32 on the CPU, 8 texts a step, no dropout, a curve nowhere."""
    return [
        *("--model_name_or_path", str(model_dir), "--dataset", str(catalogue)),
        *("--output_dir", str(tmp_path / "run"), "--cache_dir", str(tmp_path / "cache")),
        *("--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "1"),
        *("--learning_rate", "1e-3", "--logging_steps", "1", "--report_to", "none", "--disable_tqdm", "true"),
        *("--use_cpu", "true"),
    ]


@pytest.fixture
def run(train_words, tmp_path):
    """run("name", *more words) trains in a folder of that name and returns it."""
    import train  # seconds to import

    def run(name: str, *words: str) -> Path:
        folder = tmp_path / name
        train.main([*train_words, "--output_dir", str(folder), *words])
        return folder

    return run


def history(run: Path) -> list[dict]:
    """The log of a run's newest checkpoint."""
    return json.loads((list_checkpoints(run)[-1] / "trainer_state.json").read_text())["log_history"]


def losses(run: Path, key: str = "loss") -> list[float]:
    return [line[key] for line in history(run) if key in line]


def results(run: Path) -> dict:
    return json.loads((run / "all_results.json").read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_weights(one: Path, other: Path, **tolerance) -> None:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], **(tolerance or {"atol": 0, "rtol": 0}))


@pytest.fixture
def small_disk(tmp_path, request):
    """A file system of 4 MiB, or as many as the test says; a real one."""
    size = getattr(request, "param", "4m")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small disk needs the right to mount one ({mounted.stderr.strip()})")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def environment_without_launcher() -> dict[str, str]:
    """This process's, without what train.main set in it: that would bind a program to this process's port."""
    launcher = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    return {name: value for name, value in os.environ.items() if name not in launcher}


TWO_PROCESSES = """
import os, sys, time
import torch.distributed as dist
from neoflix.runtime import watchdog
from neoflix.runtime.processes import run_on_main_process, gather, main_process_first, run_and_exit, wait_for_others
from neoflix.runtime.errors import StoppedEarly, UserError
RANK = int(os.environ["RANK"])
def connect_processes():
    dist.init_process_group("gloo")
    gather(None)
def main():
    print("started", os.getpid(), flush=True)
{main}
run_and_exit(main)
"""


@pytest.fixture
def start_two(tmp_path):
    """start_two(code) -> two processes, with ranks 0 and 1, that run `code` as their main function."""
    from forked import start_ranks

    started = []

    def start(code: str, **env: str) -> list:
        script = tmp_path / "program.py"
        script.write_text(TWO_PROCESSES.format(main="\n".join(f"    {line}" for line in code.splitlines())))
        logs = [tmp_path / f"log-{rank}" for rank in range(2)]
        started.extend(start_ranks(2, script, env=environment_without_launcher() | env, logs=logs))
        return started

    yield start
    for program in started:
        program.kill()
        program.wait()


@pytest.fixture
def run_two(start_two, tmp_path):
    """run_two(code) -> the two exit codes and what the two processes printed, without "started"."""

    def run(code: str, **env: str) -> tuple[list[int], list[str]]:
        codes = [program.wait(timeout=90) for program in start_two(code, **env)]
        logs = [(tmp_path / f"log-{rank}").read_text() for rank in range(2)]
        return codes, [log.partition("\n")[2] for log in logs]

    return run


def run_program(*words: str, expect: int = 0, env: dict | None = None, timeout: int = 600) -> str:
    """Runs a command in the project's folder; returns stdout and stderr together, checks the exit code.

    A command that takes longer than `timeout` seconds is ended with all that it started, and shows what it printed.
    """
    with tempfile.TemporaryFile("w+") as log:  # not a pipe: a process left behind would hold it open
        # By this Python: the script's first line may name another, as in a virtual environment that was copied.
        words = [str(word) for word in (words if words[0] != DEEPSPEED else (PYTHON, *words))]
        program = subprocess.Popen(
            words,
            cwd=ROOT,
            env=environment_without_launcher() | (env or {}),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            outcome = f"exit code {program.wait(timeout)}"
        except subprocess.TimeoutExpired:
            outcome = f"still running after {timeout} s"
        finally:  # after Ctrl-C too, which a session of its own does not hear
            if program.poll() is None:
                os.killpg(program.pid, signal.SIGKILL)
                program.wait()
        log.seek(0)
        output = log.read()
    assert outcome == f"exit code {expect}", f"{outcome}, expected exit code {expect}:\n{output}"
    return output


def netflix_csv() -> Path | None:
    """The real catalogue: NETFLIX_TITLES_CSV, or data/netflix_titles.csv once it was downloaded."""
    path = Path(os.environ.get("NETFLIX_TITLES_CSV", ROOT / "data" / "netflix_titles.csv"))
    return path if path.is_file() else None


def gpt2_tokenizer_dir() -> Path | None:
    """The real GPT-2 vocab.json and merges.txt, in the folder GPT2_TOKENIZER_DIR."""
    path = Path(os.environ.get("GPT2_TOKENIZER_DIR", ROOT / "data" / "gpt2_tokenizer"))
    return path if (path / "vocab.json").is_file() else None


@pytest.fixture
def folder(tmp_path) -> Path:
    """A run's folder with its list of files."""
    claim(str(tmp_path / "run"))
    return tmp_path / "run"


def save_checkpoint(path: Path, step: int, **files: str) -> Path:
    """Makes a small complete checkpoint; it belongs to the run in whose folder it lies."""
    path.mkdir()
    for name, content in {"model.safetensors": f"weights of step {step}", **files}.items():
        (path / name).write_text(content)
    owner = {"run": owned["id"]} if (owned := read_list(path.parent)) else {}
    write_manifest(path, {"step": step, "best_step": None, **owner}, {})
    return path


def list_names(folder: Path) -> list[str]:
    """What is in a run's folder, but for its list of files."""
    return sorted(path.name for path in folder.iterdir() if path.name != LIST_FILE)


@pytest.fixture
def describe(train_words, tmp_path):
    """describe("--seed", "7"): the record that `train.py` makes of a run with these flags."""
    from neoflix.checkpoints.runs import describe_run
    from neoflix.data.sources import read_dataset
    from neoflix.data.split import split_texts
    from neoflix.model.load import find_tokenizer, load_model

    prepare_environment()

    def describe(*words: str) -> dict:
        args = parse_train_args([*train_words, *ON_CPU, *words])
        texts = split_texts(read_dataset(args), args.validation_fraction)
        tokenizer = find_tokenizer(args.model_name_or_path, texts.train, tmp_path, args.text_template)
        model = load_model(args.model_name_or_path, tokenizer, torch.float32, args.generation, lora=args.lora_settings)
        tokens = tokenize_split(texts, tokenizer, args.max_length or 256, tmp_path, args.loss_on_prompt)
        return describe_run(args, model, tokenizer, *tokens)

    return describe
