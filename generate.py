"""Sample new texts from a fine-tuned model: `python generate.py --model_dir results --num_samples 20`."""

import json
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from neoflix import judging
from neoflix.checkpoint import find_model
from neoflix.config import SAMPLING_DEFAULTS, parse_generate_args
from neoflix.distributed import progress, run_and_exit
from neoflix.generation import Sample, Sampler


def main(argv: list[str] | None = None) -> None:
    args = parse_generate_args(argv)
    if isinstance(args.judge, str):
        return judging.judge_file(args)
    prompts = read_prompts(args.prompt)
    if args.output and os.path.exists(args.output):
        raise ValueError(f"--output {args.output}: exists already; choose another name or delete it")

    # What is judged by comes before the model: a data set that cannot be read costs seconds then.
    judge = judging.Judge(args) if args.judge or args.novel or args.sweep else None
    sampler = Sampler.load(find_model(args.model_dir), allow_pickle=args.allow_pickle)
    settings = {name: getattr(args, name) for name in SAMPLING_DEFAULTS}
    sample = partial(sampler.sample, seed=args.seed, batch_size=args.batch_size, **settings)
    if args.sweep:
        return judging.sweep(judge, partial(sample, prompts, args.num_samples), args.sweep, args.output)
    if args.novel:
        samples = judging.keep_novel(sample, judge.training, prompts, args.num_samples)
    else:
        samples = sample(prompts, args.num_samples)
    if args.output:
        save_samples(samples, args.output, total=len(prompts) * args.num_samples)
    else:
        samples = print_samples(samples)
    if args.judge:
        judge.report(judging.read_samples(args.output) if args.output else samples, args.output)


def read_prompts(prompt: str) -> list[str]:
    """The prompt itself, or the lines of the file it names, blank ones left out."""
    if not os.path.isfile(prompt):
        return [prompt]
    try:
        prompts = [line for line in Path(prompt).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompt {prompt}: cannot be read as UTF-8 text ({error})") from error
    if not prompts:
        raise ValueError(f"--prompt {prompt}: the file has no line with text")
    return prompts


def print_samples(samples: Iterable[Sample]) -> list[dict]:
    """Prints a line a text, as they come, and returns what a file would have held."""
    rows = []
    for number, sample in enumerate(samples, start=1):
        print(f"{number:>3}. {' '.join(sample.text.split())}", flush=True)
        rows.append(sample.to_dict())
    return rows


def save_samples(samples: Iterable[Sample], path: str, total: int) -> None:
    """Writes one JSON object a line, as they come; never over a file that exists."""
    try:
        with open(path, "x", encoding="utf-8") as output:
            for sample in progress(samples, total=total, desc="Sampling", unit="text"):
                output.write(json.dumps(sample.to_dict(), ensure_ascii=False) + "\n")
                output.flush()
    except OSError as error:
        raise ValueError(f"--output {path}: cannot be written ({error.strerror})") from error


if __name__ == "__main__":
    run_and_exit(main)
