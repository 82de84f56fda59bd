"""Judging samples: finds the run's training texts and base model, and reports the figures."""

from dataclasses import asdict
from functools import cache, cached_property
from pathlib import Path

from neoflix.arguments.training import TrainArguments
from neoflix.checkpoints.runs import find_run
from neoflix.data.sources import find_dataset, find_local_dataset, read_examples
from neoflix.data.split import split_texts
from neoflix.data.tables import read_table
from neoflix.data.template import Template
from neoflix.data.tokens import MOST_LEFT_OUT
from neoflix.judging.base_model import PERPLEXITY_TEXTS, BaseModel, find_base_model
from neoflix.judging.figures import Judgement, judge, judgement_table
from neoflix.judging.novelty import TrainingTexts
from neoflix.judging.variety import choose_texts
from neoflix.runtime.cache import default_cache_dir
from neoflix.runtime.console import printable, say
from neoflix.runtime.errors import UserError
from neoflix.runtime.files import read_json, write_json


def read_training_texts(args, download: bool = True) -> list[str]:
    """The texts that a run was trained on, without those it held out; or those of `--dataset`.

    Args:
        download: whether a data set that is not on this machine may be downloaded.

    Raises:
        UserError: if there is no record of the data set, it has changed, or it is not here and may not be downloaded.
    """
    run = find_run(args.model_dir) or {}
    recorded = run.get("texts", {})
    dataset = args.dataset or recorded.get("dataset")
    if dataset is None:
        raise UserError(
            f"--model_dir {args.model_dir}: has no record of the training texts; name them with --dataset (and "
            "--text_column)"
        )
    column = args.text_column or recorded.get("text_column")
    fraction = args.validation_fraction
    if fraction is None:
        fraction = recorded.get("validation_fraction", TrainArguments.validation_fraction)
    template = recorded.get("template") if args.dataset is None and args.text_column is None else None
    path = find_dataset(dataset) if download else find_local_dataset(dataset, default_cache_dir())
    if path is None:
        raise UserError(f"{dataset}: is not on this machine; name the training texts with --dataset")
    examples = read_examples(path, column, Template(template) if template else None)
    texts = [example.completion.strip() for example in split_texts(examples, fraction).train]
    is_as_recorded = (args.dataset, args.text_column, args.validation_fraction) == (None, None, None)
    # A run with a template leaves out the texts for which the prompt leaves no room.
    most_left_out = int(MOST_LEFT_OUT * len(texts) / (1 - fraction)) if template else 0
    if is_as_recorded and not 0 <= len(texts) - run["num_training_texts"] <= most_left_out:
        raise UserError(
            f"{dataset}: has changed since the run was trained on it ({run['num_training_texts']:,} training texts "
            f"then, {len(texts):,} now); name the original file with --dataset"
        )
    held_out = f" (without the {fraction:.0%} held out)" if fraction else ""
    say(f"Judging against {len(texts):,} training text(s) of {dataset}{held_out}")
    return texts


class Judge:
    """Judges samples against training texts, and by a base model that is loaded when it is needed."""

    def __init__(self, args):
        self.texts = read_training_texts(args)
        self.training = TrainingTexts(self.texts)
        self.base_name, self.no_base = find_base_model(args)
        self.allow_pickle = args.allow_pickle
        self._perplexity_of_texts = cache(self._perplexity_of_texts)

    @cached_property
    def base(self) -> BaseModel | None:
        """The base model; None if there is none, with the reason in `no_base`."""
        if self.base_name is None:
            return None
        try:
            return BaseModel.load(self.base_name, self.allow_pickle)
        except UserError as error:
            self.no_base = str(error).replace("--model_name_or_path", "--base_model", 1)
            say(f"warning: perplexity was not measured: {self.no_base}")
            return None

    def _perplexity_of_texts(self, num: int) -> float | None:
        return self.base.perplexity(choose_texts(self.texts, num))

    def judge(self, rows: list[dict]) -> Judgement:
        """Judges rows of a file of samples: `text` and, if there is one, `finish_reason`."""
        texts = [row["text"] for row in rows]
        reasons = [row["finish_reason"] for row in rows if "finish_reason" in row]
        ended = reasons.count("eos") / len(reasons) if reasons and len(reasons) == len(rows) else None
        if self.base is None:
            return judge(texts, self.training, ended, no_perplexity=self.no_base)
        num = min(len(texts), PERPLEXITY_TEXTS)
        of_samples, of_texts = self.base.perplexity(choose_texts(texts, num)), self._perplexity_of_texts(num)
        return judge(texts, self.training, ended, of_samples=of_samples, of_texts=of_texts)

    def report(self, rows: list[dict], path: str | None) -> Judgement:
        """Judges samples and prints the table. If the samples have a file, writes NAME.judged.json next to it."""
        judged = Path(path).with_suffix(".judged.json") if path else None
        if judged and judged.exists() and "base_model" not in read_json(judged, {}):
            raise UserError(f"{judged}: is not a file that neoflix wrote, so it is not overwritten; move it away")
        judgement = self.judge(rows)
        print(printable(f"\n{judgement_table(judgement, self.base_name or '')}"))
        if judged:
            write_figures(judged, {"base_model": self.base_name, **asdict(judgement)})
            say(f"Figures in {judged}")
        return judgement


def judge_file(args) -> None:
    """`--judge FILE`: judges the samples in a file."""
    rows = read_samples(args.judged_file)
    Judge(args).report(rows, args.judged_file)


def read_samples(path: str) -> list[dict]:
    """Reads a file of samples: JSON lines as `generate.py` writes them, or any other table with a column `text`.

    Raises:
        UserError: if the file cannot be read, or a row has no text.
    """
    table = read_table(Path(path).expanduser(), flag="--judge")
    if "text" not in table.names:
        raise UserError(f"--judge {path}: has no column text; it has {', '.join(table.names)}")
    rows = [{name: cell for name, cell in zip(table.names, row, strict=True) if cell is not None} for row in table.rows]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row.get("text"), str):
            raise UserError(f"--judge {path}: row {number} has no text")
    return rows


def write_figures(path: Path, content: dict | list) -> None:
    try:
        write_json(path, content)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error
