"""Judging a run's samples: finds the texts it learnt from and the model it began as, and keeps what quality.py says."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import cache, cached_property
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from neoflix.config import TrainArguments
from neoflix.console import printable, progress, say
from neoflix.data import MOST_CROWDED, split_texts
from neoflix.errors import UserError
from neoflix.loss import IGNORED
from neoflix.manifest import write_json
from neoflix.model import DEMO, get_window, load_for_reading
from neoflix.quality import (
    Judgement,
    TrainingTexts,
    draw_sweep,
    judge,
    judgement_table,
    some,
    sweep_header,
    sweep_line,
)
from neoflix.reading import find_dataset, read_texts
from neoflix.record import read_json
from neoflix.runs import find_run
from neoflix.tables import read_table
from neoflix.template import Template, parts
from neoflix.tokenizer import read_tokenizer

PERPLEXITY_TEXTS = 1000  # a large model reads no more of them: at 1,000 texts chance moves the figure by a few per cent
BATCH_SIZE = 8  # texts that the base model reads at once
DRAWS_PER_TEXT = 20  # --novel gives up beyond: a model that mostly repeats its texts is not mended by drawing


def read_training_texts(args) -> list[str]:
    """The texts a run has learnt from, without those it held out; or those of `--dataset`.

    UserError where no one says which they are, or where the file is no longer what it was.
    """
    run = find_run(args.model_dir) or {}
    recorded = run.get("texts", {})
    dataset = args.dataset or recorded.get("dataset")
    if dataset is None:
        raise UserError(
            f"--model_dir {args.model_dir}: nothing there says which texts it learnt from; name them with --dataset "
            "(and --text_column)"
        )
    column = args.text_column or recorded.get("text_column")
    fraction = args.validation_fraction
    if fraction is None:
        fraction = recorded.get("validation_fraction", TrainArguments.validation_fraction)
    template = recorded.get("template") if args.dataset is None and args.text_column is None else None
    texts = read_texts(find_dataset(dataset), column, Template(template) if template else None)
    texts = [parts(text)[1].strip() for text in split_texts(texts, fraction).train]
    is_as_recorded = (args.dataset, args.text_column, args.validation_fraction) == (None, None, None)
    # Of a run with a template texts may have been left out, whose prompts left no room for them.
    most_crowded = int(MOST_CROWDED * len(texts) / (1 - fraction)) if template else 0
    if is_as_recorded and not 0 <= len(texts) - run["num_training_texts"] <= most_crowded:
        raise UserError(
            f"{dataset}: has changed since the run learnt from it ({run['num_training_texts']:,} training texts "
            f"then, {len(texts):,} now); name the file as it was with --dataset"
        )
    held_out = f" (without those held out, {fraction:.0%})" if fraction else ""
    say(f"Judging against {len(texts):,} training text(s) of {dataset}{held_out}")
    return texts


# ---- the base model -------------------------------------------------------------------------------------


def find_base_model(args) -> tuple[str | None, str]:
    """(hub name or folder of the model that the run began as, or None; why there is none)."""
    if args.base_model == "none":
        return None, "left out by --base_model none"
    if isinstance(args.judge, str) and args.base_model is None:
        return None, "no model was loaded; name one with --base_model"
    name = args.base_model or (find_run(args.model_dir) or {}).get("model")
    if name is None:
        return None, f"nothing in {args.model_dir} says what the model was; name it with --base_model"
    if name == DEMO:
        return None, "the run began from scratch; name another model with --base_model"
    return name, ""


class BaseModel:
    """A pretrained model that says how probable texts are.

    Args:
        tokenizer: the model's own; its end token stands before each text, as between two documents.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.model, self.tokenizer = model.eval(), tokenizer

    @classmethod
    def load(cls, name: str, allow_pickle: bool = False) -> "BaseModel":
        """Loads it, on CUDA in bf16 (fp16 before Ampere), else on the CPU in fp32. UserError where it is not there."""
        model = load_for_reading(name, None, allow_pickle)
        tokenizer = read_tokenizer(name, f"--base_model {name}")
        if tokenizer.eos_token_id is None:
            raise UserError(f"--base_model {name}: its tokenizer has no end token to put before a text")
        return cls(model, tokenizer)

    @torch.inference_mode()
    def perplexity(self, texts: Iterable[str]) -> float | None:
        """exp of the mean loss in nats per token of the base's tokenizer, over all texts' tokens together.

        Texts are read one by one, each after an end token, their own end not counted; those longer than the model's
        window up to there. None where no text has a token.
        """
        window, start = get_window(self.model), self.tokenizer.eos_token_id
        encoded = self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False)
        rows = sorted(([start, *ids][:window] for ids in encoded["input_ids"] if ids), key=len)
        total, num_tokens = 0.0, 0
        for at in progress(range(0, len(rows), BATCH_SIZE), desc="Perplexity", delay=2):
            batch = [torch.tensor(row) for row in rows[at : at + BATCH_SIZE]]
            # Padding on the right: no token before it sees it.
            input_ids = pad_sequence(batch, batch_first=True, padding_value=start).to(self.model.device)
            labels = pad_sequence(batch, batch_first=True, padding_value=IGNORED).to(self.model.device)
            num_labels = sum(len(row) - 1 for row in batch)
            total += self.model(input_ids=input_ids, labels=labels).loss.double().item() * num_labels
            num_tokens += num_labels
        return math.exp(min(total / num_tokens, 700.0)) if num_tokens else None


# ---- judging --------------------------------------------------------------------------------------------


class Judge:
    """Training texts, indexed, and a base model that is loaded when it is first needed."""

    def __init__(self, args):
        self.texts = read_training_texts(args)
        self.training = TrainingTexts(self.texts)
        self.base_name, self.no_base = find_base_model(args)
        self.allow_pickle = args.allow_pickle
        self._perplexity_of_texts = cache(self._perplexity_of_texts)

    @cached_property
    def base(self) -> BaseModel | None:
        """The base model; None, with the reason in `no_base`, where there is none."""
        if self.base_name is None:
            return None
        try:
            return BaseModel.load(self.base_name, self.allow_pickle)
        except UserError as error:
            self.no_base = str(error).replace("--model_name_or_path", "--base_model", 1)
            say(f"warning: perplexity is not measured: {self.no_base}")
            return None

    def _perplexity_of_texts(self, num: int) -> float | None:
        return self.base.perplexity(some(self.texts, num))

    def judge(self, rows: list[dict]) -> Judgement:
        """Judges samples as they stand in a file: `text` and, where known, `finish_reason`."""
        texts = [row["text"] for row in rows]
        reasons = [row["finish_reason"] for row in rows if "finish_reason" in row]
        ended = reasons.count("eos") / len(reasons) if reasons and len(reasons) == len(rows) else None
        if self.base is None:
            return judge(texts, self.training, ended, no_perplexity=self.no_base)
        num = min(len(texts), PERPLEXITY_TEXTS)
        of_samples, of_texts = self.base.perplexity(some(texts, num)), self._perplexity_of_texts(num)
        return judge(texts, self.training, ended, of_samples=of_samples, of_texts=of_texts)

    def report(self, rows: list[dict], path: str | None) -> Judgement:
        """Judges samples, prints the table and, where they have a file, keeps the figures beside it."""
        judged = Path(path).with_suffix(".judged.json") if path else None
        if judged and judged.exists() and "base_model" not in read_json(judged, {}):
            raise UserError(f"{judged}: is not a file that neoflix wrote, and is left alone; move it away")
        judgement = self.judge(rows)
        print(printable(f"\n{judgement_table(judgement, self.base_name or '')}"))
        if judged:
            _write(judged, {"base_model": self.base_name, **asdict(judgement)})
            say(f"Figures in {judged}")
        return judgement


def judge_file(args) -> None:
    """`--judge FILE`: judges samples that lie there already."""
    rows = read_samples(args.judge)
    Judge(args).report(rows, args.judge)


def read_samples(path: str) -> list[dict]:
    """Samples of a file, each with a `text`: JSON lines as `generate.py` writes them, or any other table. UserError for
    anything else."""
    table = read_table(Path(path).expanduser(), flag="--judge")
    if "text" not in table.names:
        raise UserError(f"--judge {path}: has no column text, but {', '.join(table.names)}")
    rows = [{name: cell for name, cell in zip(table.names, row, strict=True) if cell is not None} for row in table.rows]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row.get("text"), str):
            raise UserError(f"--judge {path}: row {number} has no text")
    return rows


def _write(path: Path, content: dict | list) -> None:
    try:
        write_json(path, content)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


# ---- what samples are drawn for -------------------------------------------------------------------------


def keep_novel(
    sample: Callable[..., Iterator], training: TrainingTexts, prompts: list[str], num_samples: int
) -> Iterator:
    """Yields `num_samples` samples for each prompt that are neither copies nor near twins of training texts.

    First those that would be drawn anyway, without the dropped ones; then, in their place and with the indices that
    follow, others. What is kept depends on seed and settings alone.

    Args:
        sample: `Sampler.sample` with seed and settings; called with prompts, `num_samples` and `first_index`.

    Raises:
        UserError: where more than 20 draws were needed for each sample that was asked for.
    """
    wanted = len(prompts) * num_samples
    missing, drawn = Counter(dict.fromkeys(range(len(prompts)), num_samples)), 0
    rounds = [(list(range(len(prompts))), num_samples)]
    while rounds:
        for numbers, num in rounds:
            if drawn + num * len(numbers) > DRAWS_PER_TEXT * wanted:
                raise UserError(
                    f"--novel: {drawn:,} texts were drawn and {wanted - missing.total():,} of the {wanted:,} asked for "
                    "are new; raise --temperature or --top_p, or train for fewer epochs"
                )
            samples = sample([prompts[number] for number in numbers], num, first_index=drawn)
            for place, each in enumerate(samples):
                drawn += 1
                if training.is_novel(each.text):
                    missing[numbers[place // num]] -= 1
                    yield each
        rounds = [([number], num) for number, num in missing.items() if num]


def sweep(judge: Judge, sample: Callable[..., Iterator], settings: list[dict], output: str) -> dict[str, Judgement]:
    """Samples and judges once for each of the settings; prints a line each.

    Args:
        sample: `Sampler.sample` with all that stays the same; called with one of `settings`.
        output: a new folder; gets each setting's samples, the figures (sweep.json) and the drawing (sweep.png).
    """
    folder, judgements, rows = Path(output), {}, []
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be made a folder ({error.strerror})") from error
    names = [",".join(f"{name}={value}" for name, value in each.items()) for each in settings]
    width = max(map(len, names))
    print(sweep_header(width), flush=True)
    for name, each in zip(names, settings, strict=True):
        samples = [one.to_dict() for one in progress(sample(**each), desc=name, unit="text", leave=False, disable=None)]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in samples)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        judgements[name] = judge.judge(samples)
        print(printable(sweep_line(name, judgements[name], width)), flush=True)
        rows.append({"settings": each, **asdict(judgements[name])})
        _write(folder / "sweep.json", {"base_model": judge.base_name, "rows": rows})
    if judge.no_base:
        print(f"perplexity not measured: {judge.no_base}")
    if draw_sweep(judgements, folder / "sweep.png"):
        say(f"Novelty against fluency: {folder / 'sweep.png'}")
    else:
        say("No sweep.png: texts without spaces between words need --base_model, whose perplexity measures fluency")
    return judgements
