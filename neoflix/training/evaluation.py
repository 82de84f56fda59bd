"""`train.py --eval_only`: how well a model foresees texts that were held out, without training it.

Perplexity is per token: between models whose tokenizers differ it does not compare, since longer tokens are harder to
foresee and there are fewer of them. Bits per character do compare: the losses of all tokens, end token included, in
bits, over the texts' own characters.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import set_seed

from neoflix.arguments.training import TrainArguments
from neoflix.checkpoints.find import find_model
from neoflix.checkpoints.gather import whole_weights
from neoflix.checkpoints.runs import describe_texts, find_run
from neoflix.data import sources, split
from neoflix.data.tokens import check_room, fill_up, name_tokens, tokenize_texts
from neoflix.model.load import find_tokenizer, load_model
from neoflix.model.vocabulary import get_window
from neoflix.runtime.cache import default_cache_dir
from neoflix.runtime.console import say
from neoflix.runtime.errors import UserError
from neoflix.runtime.processes import main_process_first, run_on_main_process
from neoflix.sampling.architectures import check_can_be_sampled
from neoflix.training.agreement import check_same_everywhere
from neoflix.training.trainer import TokenTrainer

RESULTS = "eval_results.jsonl"  # in --output_dir, one line for each evaluation


def evaluate_only(args: TrainArguments) -> None:
    """Prints a model's loss, perplexity and bits per character on the validation texts, as a table and as JSON.

    `--model_name_or_path`: a run's folder (its best model), one checkpoint of it, any other model's folder or hub name,
    or `demo`. None of them is written to. The figures are those that a run itself reports: the same split, the same
    tokens, the same sum over all processes. Collective.
    """
    set_seed(args.seed)
    cache_dir = Path(args.cache_dir or default_cache_dir())
    output_dir = args.output_dir
    with _find_weights(args.model_name_or_path) as source, tempfile.TemporaryDirectory() as args.output_dir:
        with main_process_first():
            texts = split.split_texts(sources.read_dataset(args), args.validation_fraction)
            tokenizer = find_tokenizer(source, texts.train, cache_dir)
        check_same_everywhere(args, texts)
        model = load_model(source, tokenizer, args.weight_dtype, {}, args.allow_pickle)
        check_can_be_sampled(model)
        max_length = min(args.max_length or get_window(model), get_window(model))
        with main_process_first():
            options = (tokenizer, max_length, cache_dir, args.loss_on_prompt)
            tokens = tokenize_texts(texts.validation, *options)
        check_room([texts.validation], [tokens], max_length)
        trainer = TokenTrainer(
            model=model,
            args=args,
            eval_dataset=fill_up(tokens.dataset, args.eval_batch_size * args.world_size, tokenizer.bos_token_id),
            processing_class=tokenizer,
        )
        figures = trainer.evaluate()
    run = find_run(args.model_name_or_path)
    results = {
        "model": args.model_name_or_path,
        "loaded_from": _find_folder(args.model_name_or_path),
        "eval_loss": figures["eval_loss"],
        "perplexity": figures["eval_perplexity"],
        "eval_bits_per_char": figures["eval_bits_per_char"],
        "eval_texts": len(tokens.dataset),
        "eval_tokens": tokens.num_tokens - sum(tokens.dataset["prompt_length"]),
        "eval_texts_cut": tokens.num_cut,
        "vocab_size": len(tokenizer),
        "dtype": str(args.weight_dtype).removeprefix("torch."),
        "same_texts_as_run": run
        and run["data"] == name_tokens(texts.train, tokenizer, max_length, args.loss_on_prompt),
        **describe_texts(args),
    }
    run_on_main_process(_report, results, run, output_dir)


def _find_folder(model_name_or_path: str) -> str:
    """Where a model's weights are looked for: of a run's folder, its best model; a hub name is itself."""
    if Path(model_name_or_path).is_dir():
        return str(find_model(model_name_or_path, "--model_name_or_path"))
    return model_name_or_path


@contextmanager
def _find_weights(model_name_or_path: str) -> Iterator[str]:
    """A folder, or hub name, with a model's whole weights; ZeRO-3's shards are gathered elsewhere."""
    folder = _find_folder(model_name_or_path)
    if not Path(folder).is_dir():
        yield folder
        return
    with whole_weights(Path(folder), in_place=False) as source:
        yield str(source)


def _report(results: dict, run: dict | None, output_dir: str) -> None:
    """One process: prints the figures and, where there is a folder for them, appends them to its file."""
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
        say(f"warning: these are not the texts that {results['model']} held out{_learnt(results, run)}")
    say(json.dumps(results))
    if output_dir:
        try:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            with Path(output_dir, RESULTS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(results) + "\n")
        except OSError as error:
            raise UserError(f"--output_dir {output_dir}: cannot be written ({error.strerror})") from error


def _learnt(results: dict, run: dict) -> str:
    """Whether the run may have learnt from these texts. A text's hash decides its side, whatever file it stands in:
    only a larger share held out takes texts that were learnt from."""
    before = run.get("texts", {}).get("validation_fraction")
    if before is not None and results["validation_fraction"] > before:
        return f"; with --validation_fraction above {before} it has learnt some of them"
    return ""
