"""Texts that a model writes while it trains.

Prompts and seeds are the same at every evaluation, so only the model changes from one to the next. The run itself is
not affected: no random generator is used (the noise is a hash, see `sampling/draw.py`), weights and modules stay as
they are, and the clock stands still.
"""

import textwrap
from pathlib import Path

import torch
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, is_deepspeed_zero3_enabled

from neoflix.data.fields import FieldPool
from neoflix.reporting.run_log import read_live_samples, write_live_samples
from neoflix.runtime.console import is_main_process, printable, say, write_beside_progress
from neoflix.runtime.processes import gather, num_processes
from neoflix.sampling.sampler import Sample, Sampler

MAX_NEW_TOKENS = 48
SEED = 42
COLUMNS = 110  # of a line on the screen


class ShowSamples(TrainerCallback):
    """Writes a few texts at every evaluation: to a file in the run's folder (`LIVE_SAMPLES_FILE`), to TensorBoard, and
    the first text of each prompt to the screen.

    The main process writes them while the others wait. Under ZeRO-3 with several processes, none of them holds the
    whole model, and no texts are written.

    Args:
        callbacks: the trainer's, among which TensorBoard's may be.
        field_pool: what the fields of a template's prompts are drawn from.
    """

    def __init__(self, callbacks: list[TrainerCallback], field_pool: FieldPool | None = None):
        self._callbacks, self._field_pool = callbacks, field_pool
        self._sampler: Sampler | None = None
        self._prompts: list[str] | list[dict] = []

    def on_train_begin(self, args, state, control, model=None, processing_class=None, **kwargs):
        if num_processes() > 1 and is_deepspeed_zero3_enabled():
            say("No samples during training: under ZeRO-3 with several processes none of them holds the whole model")
            return
        self._sampler = Sampler(model, processing_class, in_training=True, field_pool=self._field_pool)
        self._sampler.check_prompts(args.sample_prompts, "--sample_prompts")
        # For a model with a template and no prompts from the user: the fields that each text's number draws.
        self._prompts = [{}] if self._sampler.template and args.sample_prompts == [""] else args.sample_prompts
        if is_main_process():
            before = read_live_samples(args.output_dir) if state.global_step else []
            self._keep(args, [row for row in before if row["step"] <= state.global_step])

    def on_evaluate(self, args, state, control, **kwargs):
        if self._sampler is None:  # not training, or not here
            return
        samples = self._write(args) if is_main_process() else []
        gather(None)  # the others wait here, not in the next step
        if not is_main_process():
            return
        facts = {"step": state.global_step, "epoch": state.epoch or 0.0}
        rows = [facts | {"prompt": sample.prompt, "text": sample.whole} for sample in samples]
        before = [row for row in read_live_samples(args.output_dir) if row["step"] < state.global_step]
        self._keep(args, before + rows)
        for callback in self._callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer:
                texts = "\n\n".join(sample.whole for sample in samples)
                callback.tb_writer.add_text("samples", texts, state.global_step)
        for sample in samples[:: args.num_progress_samples]:
            text = " ".join(printable(sample.whole).split())
            lines = textwrap.wrap(text, COLUMNS - 2, max_lines=2, placeholder=" ...")
            write_beside_progress("\n".join(f"  {line}" for line in lines))

    def _write(self, args) -> list[Sample]:
        num_samples, settings = args.num_progress_samples, self._sampler.settings()
        options = {
            "batch_size": num_samples * len(self._prompts),
            "max_new_tokens": min(MAX_NEW_TOKENS, settings["max_new_tokens"]),
        }
        with torch.compiler.set_stance("force_eager"):  # a compiled model would be compiled for these shapes too
            return list(self._sampler.sample(self._prompts, num_samples, SEED, **options))

    @staticmethod
    def _keep(args, rows: list[dict]) -> None:
        try:
            write_live_samples(args.output_dir, rows)
        except OSError as error:  # no reason to end a run
            say(f"warning: {Path(args.output_dir)}: samples could not be written ({error.strerror})")
