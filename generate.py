"""Sample new texts from a fine-tuned model: `python generate.py --model_dir results --num_samples 20`."""

from functools import partial
from itertools import islice
from pathlib import Path

from neoflix.arguments.generate import parse_generate_args
from neoflix.runtime.early import answer_early

if __name__ == "__main__":
    answer_early(parse_generate_args)  # --help and wrong flags: before the imports below, which take seconds

from neoflix.checkpoints.find import find_model
from neoflix.judging.judge import Judge, judge_file, read_samples
from neoflix.judging.novel_samples import keep_novel
from neoflix.judging.sweep import compare_settings
from neoflix.runtime.environment import tune_malloc
from neoflix.runtime.processes import run_and_exit
from neoflix.sampling.prompts import read_prompts
from neoflix.sampling.sample_files import open_output
from neoflix.sampling.sampler import PrintableStreamer, Sampler


def main(argv: list[str] | None = None) -> None:
    tune_malloc()
    args = parse_generate_args(argv)
    if args.judged_file:
        return judge_file(args)
    model_dir = find_model(args.model_dir)
    prompts = read_prompts(args, model_dir)
    job = open_page if args.web else sweep if args.sweep else sample_novel if args.novel else sample
    job(args, model_dir, prompts)


def open_page(args, model_dir: Path, prompts: list) -> None:
    """`--web`: a page in the browser to try the model on."""
    from neoflix.web.server import serve  # needs Gradio, which is optional

    serve(args, model_dir, load_sampler(args, model_dir, prompts), prompts[0])


def sweep(args, model_dir: Path, prompts: list) -> None:
    """`--sweep`: samples with every combination of settings and compares the figures."""
    judge = Judge(args)  # before the model: a data set that cannot be read is reported within seconds
    sampler = load_sampler(args, model_dir, prompts)
    draw = partial(sampler.sample, prompts, args.num_samples, **args.sampling)
    compare_settings(judge, draw, args.sweep, args.output)


def sample_novel(args, model_dir: Path, prompts: list) -> None:
    """`--novel`: samples until enough texts are no duplicates of training texts."""
    output = open_output(args, model_dir, prompts)
    judge, sampler = Judge(args), load_sampler(args, model_dir, prompts)
    samples = keep_novel(partial(sampler.sample, **args.sampling), judge.training, prompts, args.num_samples)
    # Which samples a resumed file has already is known only once they are drawn again.
    write(args, islice(samples, output.num_done, None), output, judge if args.judge else None)


def sample(args, model_dir: Path, prompts: list) -> None:
    """Samples `--num_samples` texts for each prompt."""
    output = open_output(args, model_dir, prompts)
    judge, sampler = Judge(args) if args.judge else None, load_sampler(args, model_dir, prompts)
    streamer = PrintableStreamer(sampler.tokenizer) if args.stream else None
    samples = sampler.sample(prompts, args.num_samples, skip=output.num_done, streamer=streamer, **args.sampling)
    write(args, samples, output, judge)


def load_sampler(args, model_dir: Path, prompts: list) -> Sampler:
    batch_size = min(filter(None, (args.batch_size, len(prompts) * args.num_samples)))
    return Sampler.load(model_dir, allow_pickle=args.allow_pickle, batch_size=batch_size, int8=args.int8)


def write(args, samples, output, judge: Judge | None) -> None:
    rows = output.write(samples)
    if judge:
        judge.report(read_samples(args.output) if args.output else rows, args.output)


if __name__ == "__main__":
    run_and_exit(main)
