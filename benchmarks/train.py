"""The 2021 article's training recipe and this project's, in turn: same texts, same model, same device.

    python benchmarks/train.py                                    # a small GPT-Neo with the real vocabulary's size
    python benchmarks/train.py --texts_per_step 15 32 64 --turns 1
    python benchmarks/train.py --architecture 2.7B                # random weights
    python benchmarks/train.py --architecture 125M --sides ours lora --texts_per_step 32    # --lora against all weights
    python benchmarks/train.py --architecture 2.7B --sides article offload one_card --device_memory_gib 24 \
        --texts_per_step 64 --recomputed_layers 8                 # where the optimizer's states lie

Each side is its own `deepspeed` job, and the sides take turns, so that other work on the machine affects both. Tokens
are random numbers; texts have the lengths of the Netflix descriptions. Real tokens are those of texts: padding costs
time and does not count. Each number of texts per step ends with a line of JSON; --output also appends it to a file.

A job's steps: first some that do not count, then timed ones, then some whose phases are timed one by one (on a GPU
the host waits between phases, so they add up to more than a plain step), and some under Python's profiler (which
slows Python down, so its shares are upper bounds).

MFU is 6 N FLOPs per real token (N = all parameters, the tied embedding once; with LoRA 4 N) over the rate of the
device in a product of large square matrices, measured in the same job.
"""

import argparse
import cProfile
import json
import os
import pstats
import statistics
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from architectures import ARCHITECTURES, PADDED_LENGTH, build_model, draw_texts
from machine import cap_device_memory, now, product_flops_per_second, run_job, write_line

from neoflix.arguments.deepspeed_file import read_ds_config
from neoflix.arguments.training import TrainArguments
from neoflix.checkpoints.start import Start
from neoflix.model.lora import add_adapters
from neoflix.runtime.environment import prepare_environment
from neoflix.training.deepspeed import build_operators, disable_shm_collectives
from neoflix.training.meters import peak_host_bytes
from neoflix.training.trainer import TokenTrainer

SIDES = ("article", "ours", "lora", "offload", "one_card")
DS_CONFIGS = {"offload": "ds_config.json", "one_card": "ds_configs/one_card.json"}  # of the others: --deepspeed
WARM_UP_STEPS, PHASE_STEPS, PROFILED_STEPS = 2, 2, 2

# The article's DeepSpeed file (its 2.7B variant), but for two things: the precision, which the device decides for
# both sides (random weights overflow fp16, and skipped steps would flatter the article), and the warm-up.
ARTICLE_DS_CONFIG = {
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": 5e-5, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0},
    },
    "zero_optimization": {
        "stage": 2,
        "allgather_partitions": True,
        "allgather_bucket_size": 500000000,
        "overlap_comm": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 500000000,
        "contiguous_gradients": True,
        "offload_optimizer": {"device": "cpu"},
    },
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "steps_per_print": 1000000000,
}


def main() -> None:
    args = parse_args()
    if args.side:
        measure_one_side(args)
        return
    for texts_per_step in args.texts_per_step:
        runs = {side: [] for side in args.sides}
        for turn in range(args.turns):
            for side in runs:
                runs[side].append(run_side(args, side, texts_per_step))
                figures = runs[side][-1]
                print(
                    f"{texts_per_step} texts a step, turn {turn + 1}, {side}: "
                    f"{figures['real_tokens_per_second']:,.0f} real tokens/s",
                    flush=True,
                )
        report(args, texts_per_step, runs)


def parse_args() -> argparse.Namespace:
    default_ds_config = ROOT / ("ds_config.json" if torch.cuda.is_available() else "ds_configs/cpu.json")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="small")
    parser.add_argument("--texts_per_step", type=int, nargs="+", default=[15], help="default: the article's batch")
    parser.add_argument("--article_texts_per_step", type=int, help="for the article's side, if different")
    parser.add_argument("--texts_per_batch", type=int, help="our side's batch size; default: all at once")
    parser.add_argument("--steps", type=int, default=8, help="steps of a turn that are timed")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--sides", choices=SIDES, nargs="+", default=SIDES[:2])
    parser.add_argument("--deepspeed", default=str(default_ds_config), help="DeepSpeed file of our side")
    parser.add_argument("--activation_checkpointing", action="store_true", help="for our side")
    parser.add_argument("--recomputed_layers", type=int, default=0, help="of the side one_card")
    parser.add_argument("--device_memory_gib", type=float, help="limit of our side's GPU memory")
    parser.add_argument("--output", help="JSON lines file to append to")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--figures", help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    return parser.parse_args()


def run_side(args: argparse.Namespace, side: str, texts_per_step: int) -> dict:
    """Runs one side in its own job and returns its figures."""
    if side == "article" and args.article_texts_per_step:
        texts_per_step = args.article_texts_per_step
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder, "figures.json")
        words = ["--side", side, "--figures", str(figures), "--texts_per_step", str(texts_per_step)]
        for name in ("architecture", "texts_per_batch", "steps", "deepspeed", "device_memory_gib", "recomputed_layers"):
            if getattr(args, name) is not None:
                words += [f"--{name}", str(getattr(args, name))]
        words += ["--activation_checkpointing"] * args.activation_checkpointing
        all_cores = str(len(os.sched_getaffinity(0)))
        run_job(__file__, words, OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", all_cores))
        return json.loads(figures.read_text())


# ---- one side, in its own job ---------------------------------------------------------------------------


def measure_one_side(args: argparse.Namespace) -> None:
    (texts_per_step,), use_cpu = args.texts_per_step, not torch.cuda.is_available()
    if args.side != "article":
        prepare_environment()
        cap_device_memory(args.device_memory_gib)
    # Before training: afterwards a capped GPU may have no room for it.
    limit = product_flops_per_second("cpu" if use_cpu else "cuda", torch.float32 if use_cpu else torch.bfloat16)
    if not use_cpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    num_steps = WARM_UP_STEPS + args.steps + PHASE_STEPS + PROFILED_STEPS
    vocab_size = ARCHITECTURES[args.architecture].vocab_size
    texts = draw_texts(texts_per_step * num_steps, min(vocab_size, 50_257))
    with tempfile.TemporaryDirectory() as folder:
        common = {
            "output_dir": folder,
            "max_steps": num_steps,
            "learning_rate": 5e-5,
            "bf16": not use_cpu or args.side == "one_card",
            "use_cpu": use_cpu,
            "save_strategy": "no",
            "eval_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
        build_trainer = build_article_trainer if args.side == "article" else build_our_trainer
        trainer = build_trainer(args, texts_per_step, texts, common)
        clock = Clock(trainer, args.steps)
        trainer.add_callback(clock)
        trainer.train(*([] if args.side == "article" else [Start(run={})]))
    figures = clock.figures(real_tokens_per_step=sum(map(len, texts)) / num_steps)
    num_parameters = trainer.model.num_parameters()
    figures |= {
        "parameters": num_parameters,
        "mfu": (4 if args.side == "lora" else 6) * num_parameters * figures["real_tokens_per_second"] / limit,
        "product_tflops": limit / 1e12,
        "peak_host_gib": peak_host_bytes() / 2**30,
    }
    if not use_cpu:
        figures["peak_device_allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
        figures["peak_device_reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
    Path(args.figures).write_text(json.dumps(figures))


def build_our_trainer(args, texts_per_step: int, texts: list[list[int]], common: dict) -> Trainer:
    texts_per_batch = args.texts_per_batch or texts_per_step
    disable_shm_collectives()
    deepspeed = str(ROOT / DS_CONFIGS[args.side]) if args.side in DS_CONFIGS else args.deepspeed
    build_operators(read_ds_config(deepspeed))
    training = TrainArguments(
        **common,
        validation_fraction=0,  # nothing is evaluated
        num_progress_samples=0,
        deepspeed=deepspeed,
        per_device_train_batch_size=texts_per_batch,
        gradient_accumulation_steps=texts_per_step // texts_per_batch,
        activation_checkpointing=args.recomputed_layers if args.side == "one_card" else args.activation_checkpointing,
    )
    transformers.set_seed(0)
    dtype = training.weight_dtype
    model = build_model(args.architecture, dtype, training.device, "ours")
    return TokenTrainer(
        model=add_adapters(model, rank=16, alpha=32, base=args.architecture) if args.side == "lora" else model,
        args=training,
        train_dataset=Dataset.from_dict({"input_ids": texts, "prompt_length": [1] * len(texts)}),
    )


def build_article_trainer(args, texts_per_step: int, texts: list[list[int]], common: dict) -> Trainer:
    training = TrainingArguments(**common, deepspeed=ARTICLE_DS_CONFIG, per_device_train_batch_size=texts_per_step)
    transformers.set_seed(0)
    dtype = torch.float32 if training.use_cpu else torch.bfloat16
    pad = ARCHITECTURES[args.architecture].vocab_size - 1

    def pad_to_the_longest(examples: list[dict]) -> dict:
        """Pads every text to the data set's longest, and counts padding in the loss."""
        rows = [example["input_ids"] + [pad] * (PADDED_LENGTH - len(example["input_ids"])) for example in examples]
        input_ids = torch.tensor(rows)
        return {"input_ids": input_ids, "attention_mask": (input_ids != pad).long(), "labels": input_ids.clone()}

    return Trainer(
        model=build_model(args.architecture, dtype, training.device, "eager"),
        args=training,
        train_dataset=Dataset.from_dict({"input_ids": texts}),
        data_collator=pad_to_the_longest,
    )


class Clock(TrainerCallback):
    """Times a job's steps: first as a whole, then by phase, then the share of Python."""

    def __init__(self, trainer: Trainer, num_timed: int):
        self.trainer = trainer
        self.first, self.last = WARM_UP_STEPS, WARM_UP_STEPS + num_timed
        self.num_timed = num_timed
        self.phases = dict.fromkeys(("data", "forward", "backward", "optimizer"), 0.0)
        self.by_phase = False
        self.profile = cProfile.Profile()

    def on_train_begin(self, args, state, control, **kwargs):
        engine, trainer = self.trainer.model_wrapped, self.trainer
        trainer.get_batch_samples = self._timed("data", trainer.get_batch_samples)
        engine.forward = self._timed("forward", engine.forward)
        engine.backward = self._timed("backward", engine.backward)
        engine.step = self._timed("optimizer", engine.step)

    def _timed(self, phase: str, function):
        def timed(*args, **kwargs):
            if not self.by_phase:
                return function(*args, **kwargs)
            began = now()
            result = function(*args, **kwargs)
            self.phases[phase] += now() - began
            return result

        return timed

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.first:
            self.began = now()
        elif state.global_step == self.last:
            self.ended = now()
            self.by_phase = True
        elif state.global_step == self.last + PHASE_STEPS:
            self.phases_ended = now()
            self.by_phase = False
            self.profile.enable()
        elif state.global_step == self.last + PHASE_STEPS + PROFILED_STEPS:
            self.profile.disable()
            self.profile_seconds = now() - self.phases_ended

    def figures(self, real_tokens_per_step: float) -> dict[str, float]:
        seconds = (self.ended - self.began) / self.num_timed
        phases = {f"seconds_{phase}": spent / PHASE_STEPS for phase, spent in self.phases.items()}
        phases["seconds_other"] = (self.phases_ended - self.ended) / PHASE_STEPS - sum(phases.values())
        spent = {"ours": 0.0, "all": 0.0}
        for (file, _, _), (_, _, own_seconds, _, _) in pstats.Stats(self.profile).stats.items():
            if file != "~":  # not a function written in C
                spent["all"] += own_seconds
                spent["ours"] += own_seconds if file.startswith(str(ROOT / "neoflix")) else 0.0
        return {
            "real_tokens_per_second": real_tokens_per_step / seconds,
            "seconds_per_step": seconds,
            "real_tokens_per_step": real_tokens_per_step,
            **phases,
            "python_share_ours": spent["ours"] / self.profile_seconds,
            "python_share_all": spent["all"] / self.profile_seconds,
        }


# ---- report ---------------------------------------------------------------------------------------------


def report(args: argparse.Namespace, texts_per_step: int, runs: dict[str, list[dict]]) -> None:
    """Prints a table of medians and one JSON line."""
    sides = {
        side: {name: statistics.median(run[name] for run in figures) for name in figures[0]}
        for side, figures in runs.items()
    }
    print(f"\n{args.architecture}, {texts_per_step} texts a step{'':8}" + "".join(f"{side:>12}" for side in sides))
    for name in next(iter(sides.values())):
        print(f"{name:28}" + "".join(f"{figures[name]:>12,.{digits(figures[name])}f}" for figures in sides.values()))
    line = {"architecture": args.architecture, "texts_per_step": texts_per_step, "turns": args.turns}
    line |= {name: getattr(args, name) for name in ("texts_per_batch", "article_texts_per_step", "device_memory_gib")}
    line |= {"deepspeed": Path(args.deepspeed).name, "activation_checkpointing": args.activation_checkpointing}
    line |= {"recomputed_layers": args.recomputed_layers}
    if len(sides) == 2:
        pairs = zip(*runs.values(), strict=True)
        ratios = [second["real_tokens_per_second"] / first["real_tokens_per_second"] for first, second in pairs]
        line |= {"ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}
        print(f"{'ratio of real tokens/s':40}{line['ratio']:>12.2f}  ({min(ratios):.2f}-{max(ratios):.2f})")
    print()
    write_line(line | sides, args.output)


def digits(figure: float) -> int:
    return 0 if figure >= 1000 else 2 if figure >= 1 else 4


if __name__ == "__main__":
    main()
