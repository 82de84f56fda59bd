"""`train.py --eval_only`: measures a model on the held-out texts, without training it.

Perplexity is per token. It does not compare between models with different tokenizers, because longer tokens are harder
to predict and there are fewer of them. Bits per character do compare: the losses of all tokens, end token included, in
bits, divided by the number of the texts' own characters.
"""

import argparse
import json
import tempfile
from pathlib import Path

from transformers import set_seed

from neoflix.arguments.training import TrainArguments
from neoflix.checkpoints.find import find_model
from neoflix.checkpoints.runs import describe_texts, find_run
from neoflix.data.sources import read_dataset
from neoflix.data.split import split_texts
from neoflix.data.tokens import check_room, fill_up, name_tokens, tokenize_texts
from neoflix.model.load import find_tokenizer, load_model
from neoflix.model.vocabulary import get_window
from neoflix.runtime.console import say
from neoflix.runtime.errors import UserError
from neoflix.runtime.processes import main_process_first, run_on_main_process
from neoflix.sampling.architectures import check_can_be_sampled
from neoflix.training.agreement import check_same_everywhere
from neoflix.training.trainer import TokenTrainer

RESULTS = "eval_results.jsonl"  # in --output_dir, one line for each evaluation


def evaluate_only(flags: argparse.Namespace) -> None:
    """Prints a model's loss, perplexity and bits per character on the held-out texts, as a table and as JSON.

    `--model_name_or_path` is a run's folder (its best model), one of its checkpoints, any other model's folder or hub
    name, or `demo`. Nothing is written to it. The figures are those that a run itself reports: the same split, the same
    tokens, the same sum over all processes. Collective.
    """
    args = TrainArguments.from_flags(flags)
    set_seed(args.seed)
    output_dir = args.output_dir
    source = _find_source(args.model_name_or_path)
    with main_process_first():
        texts = split_texts(read_dataset(args), args.validation_fraction)
        tokenizer = find_tokenizer(source, texts.train, args.cache)
    check_same_everywhere(args, texts)
    model = load_model(source, tokenizer, args.weight_dtype, {}, args.allow_pickle)
    check_can_be_sampled(model)
    max_length = min(args.max_length or get_window(model), get_window(model))
    with main_process_first():
        side = tokenize_texts(texts.validation, tokenizer, max_length, args.cache, args.loss_on_prompt)
    check_room([texts.validation], [side], max_length)
    with tempfile.TemporaryDirectory() as args.output_dir:  # Trainer wants one
        figures = TokenTrainer(
            model=model,
            args=args,
            eval_dataset=fill_up(side.dataset, args.eval_batch_size * args.world_size, tokenizer.bos_token_id),
            processing_class=tokenizer,
        ).evaluate()
    run = find_run(args.model_name_or_path)
    results = {
        "model": args.model_name_or_path,
        "loaded_from": source,
        "eval_loss": figures["eval_loss"],
        "perplexity": figures["eval_perplexity"],
        "eval_bits_per_char": figures["eval_bits_per_char"],
        "eval_texts": len(side.dataset),
        "eval_tokens": side.num_tokens - sum(side.dataset["prompt_length"]),
        "eval_texts_cut": side.num_cut,
        "vocab_size": len(tokenizer),
        "dtype": str(args.weight_dtype).removeprefix("torch."),
        "same_texts_as_run": run
        and run["data"] == name_tokens(texts.train, tokenizer, max_length, args.loss_on_prompt),
        **describe_texts(args),
    }
    run_on_main_process(_report, results, run, output_dir)


def _find_source(model_name_or_path: str) -> str:
    """Where a model is loaded from: for a run's folder, its best model; for any other name, the name itself."""
    if Path(model_name_or_path).is_dir():
        return str(find_model(model_name_or_path, "--model_name_or_path"))
    return model_name_or_path


def _report(results: dict, run: dict | None, output_dir: str) -> None:
    """Prints the figures and, with `--output_dir`, appends them to its file. One process."""
    names = ("texts", "tokens", "loss", "perplexity", "bits a character")
    values = [f"{results['eval_texts']:,}", f"{results['eval_tokens']:,}", f"{results['eval_loss']:.4f}"]
    values += [f"{results['perplexity']:.2f}", f"{results['eval_bits_per_char']:.4f}"]
    width = max(len(results["model"]), len("model"))
    for model, columns in (("model", names), (results["model"], values)):
        say(f"{model:<{width}}" + "".join(f"{column:>18}" for column in columns))
    say(
        f"Perplexity is per token of this model's {results['vocab_size']:,}; with a model that has other tokens, "
        "compare bits a character"
    )
    if results["same_texts_as_run"] is False:
        say(f"warning: these are not the texts that {results['model']} held out{_trained_on(results, run)}")
    say(json.dumps(results))
    if output_dir:
        try:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            with Path(output_dir, RESULTS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(results) + "\n")
        except OSError as error:
            raise UserError(f"--output_dir {output_dir}: cannot be written ({error.strerror})") from error


def _trained_on(results: dict, run: dict) -> str:
    """A warning where the run was trained on some of these texts.

    A text's hash decides whether it is held out, whatever file it comes from, so only a larger held-out share can
    include texts that were trained on.
    """
    before = run.get("texts", {}).get("validation_fraction")
    if before is not None and results["validation_fraction"] > before:
        return f"; with --validation_fraction above {before} it was trained on some of them"
    return ""
