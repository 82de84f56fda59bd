"""Sample new texts from a fine-tuned model: `python generate.py --model_dir results --num_samples 20`."""

import os
from functools import partial
from itertools import islice
from pathlib import Path

from neoflix.arguments.generate import parse_generate_args
from neoflix.runtime.early import answer_early

if __name__ == "__main__":
    answer_early(parse_generate_args)  # --help and wrong flags: before the imports below, which take seconds

from neoflix.arguments.sampling import SAMPLING_DEFAULTS
from neoflix.checkpoints.find import find_model
from neoflix.data.encodings import read_lines
from neoflix.data.fields import read_fields
from neoflix.data.template import find_template
from neoflix.data.tokenizer import read_tokenizer
from neoflix.judging.judge import Judge, judge_file, read_samples
from neoflix.judging.sweep import keep_novel, sweep
from neoflix.runtime.console import printable
from neoflix.runtime.environment import tune_malloc
from neoflix.runtime.errors import UserError
from neoflix.runtime.processes import run_and_exit
from neoflix.sampling.sample_files import describe_job, find_done, save_samples
from neoflix.sampling.sampler import PrintableStreamer, Sampler


def main(argv: list[str] | None = None) -> None:
    tune_malloc()
    args = parse_generate_args(argv)
    if isinstance(args.judge, str):
        return judge_file(args)
    model_dir = find_model(args.model_dir)
    prompts = read_prompts(args, model_dir)
    settings = {name: getattr(args, name) for name in SAMPLING_DEFAULTS}
    job = describe_job(model_dir, prompts, num_samples=args.num_samples, seed=args.seed, novel=args.novel, **settings)
    done = find_done(args.output, job) if args.output and not args.sweep else 0
    # What is judged by comes before the model: a data set that cannot be read costs seconds then.
    judge = Judge(args) if args.judge or args.novel or args.sweep else None
    sampler = Sampler.load(model_dir, allow_pickle=args.allow_pickle)
    sample = partial(sampler.sample, seed=args.seed, batch_size=args.batch_size, **settings)
    if args.sweep:
        return sweep(judge, partial(sample, prompts, args.num_samples), args.sweep, args.output)
    if args.novel:  # which draws were kept only drawing tells
        samples = islice(keep_novel(sample, judge.training, prompts, args.num_samples), done, None)
    else:
        streamer = PrintableStreamer(sampler.tokenizer) if args.stream else None
        samples = sample(prompts, args.num_samples, skip=done, streamer=streamer)
    if args.output:
        samples = save_samples(samples, args.output, job, len(prompts) * args.num_samples, done, quiet=args.stream)
    rows = []
    for number, text in enumerate(samples, start=1):
        if not (args.output or args.stream):
            print(f"{number:>3}. {' '.join(printable(text.whole).split())}", flush=True)
        rows.append(text.to_dict())
    if args.judge:
        judge.report(read_samples(args.output) if args.output else rows, args.output)


def read_prompts(args, model_dir: Path) -> list[str] | list[dict]:
    """For a model with a template, unless there is a prompt: fields, of each row of a file if one is named. Else the
    prompt itself, or the lines of the file it names, blank ones left out."""
    prompt, template = args.prompt, find_template(read_tokenizer(model_dir, f"--model_dir {args.model_dir}"))
    if args.fields or args.fields_file or (template and not prompt):
        return read_fields(args.fields, args.fields_file, template)
    if not os.path.isfile(prompt):
        return [prompt]
    try:
        prompts = read_lines(Path(prompt))
    except (OSError, UserError) as error:
        raise UserError(f"--prompt {prompt}: cannot be read ({error})") from error
    if not prompts:
        raise UserError(f"--prompt {prompt}: the file has no line with text")
    return prompts


if __name__ == "__main__":
    run_and_exit(main)
