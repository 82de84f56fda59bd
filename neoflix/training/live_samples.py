"""Texts that a model writes while it trains: at every evaluation the same beginnings and the same seeds, so that what
changes from one to the next is the model alone.

The run does not notice: nothing is drawn from a generator (the noise is a hash, see `decoding.py`), weights and modules
stay as they are, and the clock stands still.
"""

import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled

from neoflix.data.fields import FieldPool
from neoflix.reporting.run_log import read_live_samples, write_live_samples
from neoflix.runtime.console import is_main_process, printable, say, write_beside_progress
from neoflix.runtime.processes import gather, num_processes
from neoflix.sampling.draw import Draw
from neoflix.sampling.sampler import Sample, Sampler

MAX_NEW_TOKENS = 48


SEED = 42


COLUMNS = 110  # of a line on the screen


@dataclass(frozen=True)
class AgreedDraw(Draw):
    """A draw in which every process takes the main one's tokens: they go through the model together, and where one
    of them rounded otherwise they would not end together."""

    def __call__(self, *args) -> tuple[torch.Tensor, torch.Tensor]:
        token_B, is_short_B = super().__call__(*args)
        for agreed in (token_B, is_short_B):
            dist.broadcast(agreed, src=0)
        return token_B, is_short_B


class JointSampler(Sampler):
    """One that all processes take part in."""

    draw = AgreedDraw


class ShowSamples(TrainerCallback):
    """At every evaluation a few texts, in the run's folder (`record.LIVE_SAMPLES_FILE`), in TensorBoard, and the first
    of each beginning on the screen.

    One process writes them while the others wait; under ZeRO-3, where none of them has all weights, all do, together.

    Args:
        find_writer: what returns TensorBoard's writer, or None.
        field_pool: where the fields of a template's prompts are drawn from.
    """

    def __init__(self, find_writer: Callable, field_pool: FieldPool | None = None):
        self._find_writer, self._field_pool = find_writer, field_pool
        self._sampler: Sampler | None = None
        self._prompts: list[str] | list[dict] = []

    def on_train_begin(self, args, state, control, model=None, processing_class=None, **kwargs):
        kind = JointSampler if self._is_joint() else Sampler
        self._sampler = kind(model, processing_class, in_training=True, field_pool=self._field_pool)
        self._sampler.check_prompts(args.sample_prompts, "--sample_prompts")
        # With a template and no beginnings of the user's own: the fields that each text's number draws.
        self._prompts = [{}] if self._sampler.template and args.sample_prompts == [""] else args.sample_prompts
        if is_main_process():
            before = read_live_samples(args.output_dir) if state.global_step else []
            self._keep(args, [row for row in before if row["step"] <= state.global_step])

    def on_evaluate(self, args, state, control, **kwargs):
        if self._sampler is None:  # not training
            return
        samples = self._write(args) if is_main_process() or self._is_joint() else []
        gather(None)  # the others wait here, not in the next step
        if not is_main_process():
            return
        facts = {"step": state.global_step, "epoch": state.epoch or 0.0}
        rows = [facts | {"prompt": sample.prompt, "text": sample.whole} for sample in samples]
        before = [row for row in read_live_samples(args.output_dir) if row["step"] < state.global_step]
        self._keep(args, before + rows)
        if writer := self._find_writer():
            writer.add_text("samples", "\n\n".join(sample.whole for sample in samples), state.global_step)
        for sample in samples[:: args.num_progress_samples]:
            lines = textwrap.wrap(
                " ".join(printable(sample.whole).split()), COLUMNS - 2, max_lines=2, placeholder=" ..."
            )
            write_beside_progress("\n".join(f"  {line}" for line in lines))

    @staticmethod
    def _is_joint() -> bool:
        return num_processes() > 1 and is_deepspeed_zero3_enabled()

    def _write(self, args) -> list[Sample]:
        sampler, was_training = self._sampler, self._sampler.model.training
        sampler.model.eval()
        try:
            with torch.compiler.set_stance("force_eager"):  # a compiled model would be compiled for these shapes too
                return list(
                    sampler.sample(
                        self._prompts,
                        args.num_progress_samples,
                        SEED,
                        batch_size=args.num_progress_samples * len(self._prompts),
                        max_new_tokens=min(MAX_NEW_TOKENS, sampler.settings()["max_new_tokens"]),
                    )
                )
        finally:
            sampler.model.train(was_training)

    @staticmethod
    def _keep(args, rows: list[dict]) -> None:
        try:
            write_live_samples(args.output_dir, rows)
        except OSError as error:  # no reason to end a run
            say(f"warning: {Path(args.output_dir)}: samples could not be kept ({error.strerror})")
