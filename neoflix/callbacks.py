"""What a run does and shows while it trains."""

import sys

from transformers import EarlyStoppingCallback, ProgressCallback

from neoflix.distributed import progress


class EarlyStopping(EarlyStoppingCallback):
    """Hugging Face's, without its demand that Trainer reload the best model at the end.

    Under DeepSpeed that reloads the whole engine, optimizer states and all; the best checkpoint's weight
    files are on disk already and `checkpoint.promote` puts them at the top of the run's folder.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        pass


class Progress(ProgressCallback):
    """One bar with loss and tokens/s, and one line for each evaluation."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.current_step = state.global_step
        if state.is_world_process_zero:
            self.training_bar = progress(total=state.max_steps, initial=state.global_step, desc="Training")

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if state.is_world_process_zero:
            if self.prediction_bar is None:
                only_on_a_terminal = None  # tqdm's word for it
                self.prediction_bar = progress(
                    total=len(eval_dataloader), desc="Evaluating", leave=False, disable=only_on_a_terminal
                )
            self.prediction_bar.update(1)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or self.training_bar is None:
            return
        if "loss" in logs:
            self.training_bar.set_postfix(
                {"loss": f"{logs['loss']:.3f}", "tok/s": f"{logs['tokens_per_second']:,.0f}"}, refresh=False
            )
        elif "eval_loss" in logs:
            when = "before training" if state.global_step == 0 else f"epoch {state.epoch:.2f}"
            self.training_bar.write(
                f"{when}: validation loss {logs['eval_loss']:.4f}, perplexity {logs['eval_perplexity']:.2f}, "
                f"{logs['eval_bits_per_char']:.3f} bits a character",
                file=sys.stdout,
            )
            sys.stdout.flush()
