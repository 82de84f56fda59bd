"""Sample new texts from a fine-tuned model: `python generate.py --model_dir results --num_samples 20`."""

from collections.abc import Iterable
from functools import partial
from itertools import islice
from pathlib import Path

from neoflix.arguments.generate import parse_generate_args
from neoflix.checkpoints.find import find_model
from neoflix.judging.judge import Judge, read_samples
from neoflix.judging.novel_samples import keep_novel
from neoflix.judging.sweep import compare_settings
from neoflix.runtime.console import printable
from neoflix.runtime.environment import tune_malloc
from neoflix.runtime.processes import run_and_exit
from neoflix.sampling.prompts import read_prompts
from neoflix.sampling.sample_files import SampleFile, open_sample_file
from neoflix.sampling.sampler import PrintableStreamer, Sample, Sampler


def main(argv: list[str] | None = None) -> None:
    tune_malloc()
    args = parse_generate_args(argv)
    if args.judged_file:
        return judge_file(args)
    model_dir = find_model(args.model_dir)
    prompts = read_prompts(args, model_dir)
    job = sweep if args.sweep else sample_novel if args.novel else sample
    job(args, model_dir, prompts)


def judge_file(args) -> None:
    """`--judge FILE`: judges the samples in a file."""
    rows = read_samples(args.judged_file)
    Judge(args).report(rows, args.judged_file)


def sweep(args, model_dir: Path, prompts: list) -> None:
    """`--sweep`: samples with every combination of settings and compares the figures."""
    # The judge comes first: a data set that cannot be read is reported before the model is loaded.
    judge, sampler = Judge(args), load_sampler(args, model_dir, prompts)
    draw = partial(sampler.sample, prompts, args.num_samples, **args.sampling)
    compare_settings(judge, draw, args.sweep, args.output)


def sample_novel(args, model_dir: Path, prompts: list) -> None:
    """`--novel`: samples until enough texts are no duplicates of training texts."""
    file = open_sample_file(args, model_dir, prompts)
    judge, sampler = Judge(args), load_sampler(args, model_dir, prompts)
    samples = keep_novel(partial(sampler.sample, **args.sampling), judge.training, prompts, args.num_samples)
    samples = islice(samples, file.num_done if file else 0, None)  # drawn again: only then are they known
    write(args, samples, file, judge if args.judge else None)


def sample(args, model_dir: Path, prompts: list) -> None:
    """Samples `--num_samples` texts for each prompt."""
    file = open_sample_file(args, model_dir, prompts)
    judge, sampler = Judge(args) if args.judge else None, load_sampler(args, model_dir, prompts)
    streamer = PrintableStreamer(sampler.tokenizer) if args.stream else None
    num_done = file.num_done if file else 0
    samples = sampler.sample(prompts, args.num_samples, skip=num_done, streamer=streamer, **args.sampling)
    write(args, samples, file, judge)


def load_sampler(args, model_dir: Path, prompts: list) -> Sampler:
    batch_size = min(args.batch_size, len(prompts) * args.num_samples)
    return Sampler.load(model_dir, allow_pickle=args.allow_pickle, batch_size=batch_size)


def write(args, samples: Iterable[Sample], file: SampleFile | None, judge: Judge | None) -> None:
    """Writes the samples to the file or prints them, and judges them."""
    rows = []
    for number, each in enumerate(file.append(samples, quiet=args.stream) if file else samples, start=1):
        if not (file or args.stream):
            print(f"{number:>3}. {' '.join(printable(each.whole).split())}", flush=True)
        rows.append(each.to_dict())
    if judge:
        judge.report(read_samples(args.output) if file else rows, args.output)


if __name__ == "__main__":
    run_and_exit(main)
