"""Trainer callbacks: what a run does, checks and shows while it trains."""

import math
from pathlib import Path

from transformers import EarlyStoppingCallback, ProgressCallback, TrainerCallback

from neoflix.checkpoints.runs import save_run
from neoflix.planning.forecast import Plan
from neoflix.reporting.run_log import log_start
from neoflix.runtime.console import is_main_process, progress, write_beside_progress
from neoflix.runtime.errors import StoppedEarly
from neoflix.runtime.processes import any_across_ranks, gather, run_on_main_process
from neoflix.runtime.stop_requests import find_stop_request, forget_stop_file
from neoflix.training.deepspeed import num_elements
from neoflix.training.divergence import diverged
from neoflix.training.validation import is_evaluated


class StopOnRequest(TrainerCallback):
    """Saves one checkpoint at the end of the step and stops, in all processes, where any of them was asked to stop.

    A save that falls on the last step of an epoch waits until the epoch has ended and was evaluated: a run resumed from
    it begins with the next epoch and would never evaluate this one.
    """

    def __init__(self):
        self.reason: str | None = None
        self._save_at_epoch_end = False

    def on_train_begin(self, args, state, control, **kwargs):
        if is_main_process():
            forget_stop_file(args.output_dir)
        if self._is_asked_to_stop(args):
            raise StoppedEarly(f"Stopped before a step was taken ({self.reason})")
        if state.global_step >= state.max_steps:
            control.should_training_stop = True

    def on_step_end(self, args, state, control, **kwargs):
        is_last_of_run = state.global_step >= state.max_steps
        is_last_of_epoch = is_last_of_run or state.epoch == int(state.epoch)
        if not is_last_of_run and self._is_asked_to_stop(args):
            control.should_save = True
            control.should_training_stop = not is_last_of_epoch
        if is_last_of_epoch:
            self._save_at_epoch_end, control.should_save = control.should_save, False

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.reason and not self._save_at_epoch_end:  # stopped within the epoch, and saved
            control.should_log = control.should_evaluate = control.should_save = False
            return
        control.should_save = control.should_save or self._save_at_epoch_end
        control.should_training_stop = control.should_training_stop or self.reason is not None
        self._save_at_epoch_end = False

    def _is_asked_to_stop(self, args) -> bool:
        reason = find_stop_request(args.output_dir)
        if not any_across_ranks(reason is not None):
            return False
        self.reason = next(filter(None, gather(reason)))
        if is_main_process():
            forget_stop_file(args.output_dir)
        return True


class RecordStart(TrainerCallback):
    """Records a start in the run's folder once its first step is taken; a start that fails before that leaves the
    run's record as it was.

    Args:
        run: the run's record, by `describe_run`.
        facts: of this start, by `describe_start`.
    """

    def __init__(self, run: dict, facts: dict):
        self._run, self._facts, self._is_recorded = run, facts, False

    def on_step_end(self, args, state, control, **kwargs):
        if not self._is_recorded:
            run_on_main_process(self._record, args.output_dir)
            self._is_recorded = True

    def _record(self, output_dir: str) -> None:
        save_run(output_dir, self._run)
        log_start(output_dir, self._facts)


def describe_start(args, plan: Plan | None, model, eval_dataset, from_step: int) -> dict:
    """The facts about a start of `train.py` that its report shows."""
    num_chars = eval_dataset["num_chars"] if eval_dataset else []
    return {
        "command": args.command,
        "from_step": from_step,
        "num_processes": args.world_size,
        "deepspeed": Path(args.deepspeed).name if isinstance(args.deepspeed, str) else "given in the command",
        "precision": str(args.weight_dtype).removeprefix("torch."),
        "num_parameters": sum(map(num_elements, model.parameters())),
        "num_validation_texts": sum(chars > 0 for chars in num_chars),
        "plan_seconds": plan and plan.seconds(),
    }


class EarlyStopping(EarlyStoppingCallback):
    """Hugging Face's, without its requirement that Trainer load the best model at the end.

    Under DeepSpeed that loads the whole engine, optimizer states included. Here the weight files of the best
    checkpoint, which are on disk already, are put at the top of the run's folder (`saving.save_best`).
    """

    def on_train_begin(self, args, state, control, **kwargs):
        self.early_stopping_patience = args.early_stopping_patience  # not the one in the checkpoint
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True


class StopOnBadNumbers(TrainerCallback):
    """Raises DivergedError, in every process, for a run that no longer learns: its loss is NaN or infinite, or every
    step is skipped because gradients overflow.

    In fp16 the loss scale begins at 2 ** initial_scale_power, and each skipped step halves it. After that many skipped
    steps in a row it is down to 1, with the gradients still overflowing.
    """

    def __init__(self):
        self.num_skipped = 0

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        self.num_skipped = self.num_skipped + 1 if getattr(optimizer, "step_was_skipped", False) else 0
        if self.num_skipped >= max(10, self._scale_power(args)):
            what = f"{self.num_skipped} steps in a row were skipped: gradients overflow"
            raise diverged(args, state.global_step, what)

    def on_log(self, args, state, control, logs=None, **kwargs):
        for name in ("loss", "train_loss"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise diverged(args, state.global_step, f"the {name.replace('_', ' ')} is {logs[name]}")

    @staticmethod
    def _scale_power(args) -> int:
        return int(args.hf_deepspeed_config.get_value("fp16.initial_scale_power", 16)) if args.fp16 else 0


class EvaluateAtEnd(TrainerCallback):
    """Evaluates the model of the last step, before it is saved, where `--eval_strategy` does not: a run reports the
    figures of the model that it saves."""

    def on_epoch_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            control.should_evaluate = not is_evaluated(state)


class Progress(ProgressCallback):
    """One bar with loss and tokens/s, and one line for each evaluation."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.current_step = state.global_step
        if state.is_world_process_zero:
            self.training_bar = progress(total=state.max_steps, initial=state.global_step, desc="Training")

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if state.is_world_process_zero:
            if self.prediction_bar is None:
                only_on_a_terminal = None  # tqdm's value for it
                self.prediction_bar = progress(
                    total=len(eval_dataloader), desc="Evaluating", leave=False, disable=only_on_a_terminal
                )
            self.prediction_bar.update(1)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or self.training_bar is None:
            return
        if "loss" in logs:
            self.training_bar.set_postfix(self._figures(logs), refresh=False)
        elif "eval_loss" in logs:
            when = "before training" if state.global_step == 0 else f"epoch {state.epoch:.2f}"
            write_beside_progress(
                f"{when}: validation loss {logs['eval_loss']:.4f}, perplexity {logs['eval_perplexity']:.2f}, "
                f"{logs['eval_bits_per_char']:.3f} bits a character"
            )

    @staticmethod
    def _figures(logs: dict) -> dict[str, str]:
        """The figures shown behind the bar; the bar itself shows the time left."""
        figures = {"loss": f"{logs['loss']:.3f}", "tok/s": f"{logs['tokens_per_second']:,.0f}"}
        if "mfu" in logs:
            figures["MFU"] = f"{logs['mfu']:.0%}"
        figures["GiB"] = f"{logs.get('peak_device_bytes', logs['peak_host_bytes']) / 2**30:.1f}"
        if logs.get("skipped_steps"):
            figures["skipped"] = str(logs["skipped_steps"])
        return figures


def run_callbacks(args, has_validation: bool) -> list[TrainerCallback]:
    """The callbacks of a run with these arguments, in addition to Trainer's own."""
    callbacks = [StopOnBadNumbers()]
    if args.early_stopping_patience and args.eval_strategy != "no":
        callbacks.append(EarlyStopping(args.early_stopping_patience))
    if not args.disable_tqdm:
        callbacks.append(Progress())
    if has_validation:
        callbacks.append(EvaluateAtEnd())
    return callbacks
