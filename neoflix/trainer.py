"""Hugging Face's Trainer, counting in tokens where it counts in batches and rows."""

import math
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from transformers import Trainer

from neoflix.checkpoint import promote
from neoflix.data import TokenBatches, count_tokens
from neoflix.loss import IGNORED


class Stopwatch:
    """Seconds since the first `start`, but for what ran under `paused`."""

    def __init__(self):
        self._began, self._paused = None, 0.0

    def start(self) -> None:
        self._began = self._began or time.perf_counter()

    @contextmanager
    def paused(self):
        pause_began = time.perf_counter()
        yield
        if self._began is not None:
            self._paused += time.perf_counter() - pause_began

    def seconds(self) -> float:
        return 0.0 if self._began is None else time.perf_counter() - self._began - self._paused


def peak_host_bytes() -> int:
    """Most memory this process has held (VmHWM of Linux: unlike ru_maxrss, nothing of the process that began it)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


class TokenTrainer(Trainer):
    """A Trainer whose evaluation loss is the mean over tokens, and whose speed is in tokens.

    Trainer's own evaluation averages batches by their number of rows; a batch of packed texts is one row,
    however many tokens it holds, so that its mean is not the loss per token. Tokens are those the model
    reads, padding left out; the clock stands still while the run evaluates or saves.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.stopwatch = Stopwatch()
        self.num_tokens = 0  # this process's, since the start; becomes a tensor with padded batches: no sync
        self._last_log = (0, 0.0)

    def get_train_dataloader(self):
        """Trainer's own, or batches by their tokens where `--tokens_per_device_batch` asks for them."""
        args = self.args
        if args.tokens_per_device_batch is None:
            return super().get_train_dataloader()
        batches = TokenBatches(
            count_tokens(self.train_dataset),
            args.tokens_per_device_batch,
            args.gradient_accumulation_steps * args.world_size,
            args.process_index,
            args.world_size,
            args.seed if args.data_seed is None else args.data_seed,
        )
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
        )
        # Not accelerator.prepare: that would deal out once more what is this process's share already.
        return prepare_data_loader(loader, args.device, num_processes=1, process_index=0, put_on_device=True)

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.stopwatch.start()
        is_packed = "position_ids" in inputs
        self.num_tokens = self.num_tokens + (
            inputs["input_ids"].numel() if is_packed else inputs["attention_mask"].sum()
        )
        return super().training_step(model, inputs, num_items_in_batch)

    def log(self, logs, start_time=None):
        """Adds tokens/s of all processes since the last line to the log of training steps."""
        if "loss" in logs:
            num_tokens, seconds = self._total_tokens(), self.stopwatch.seconds()
            last_tokens, last_seconds = self._last_log
            logs["tokens_per_second"] = (num_tokens - last_tokens) / max(seconds - last_seconds, 1e-9)
            self._last_log = (num_tokens, seconds)
        super().log(logs, start_time)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Loss in nats per real token, end token counted, exact over any batch size and world size.

        Returns `{prefix}_loss`, `_perplexity`, `_bits_per_char` (of the texts' own characters) and `_runtime`
        in seconds.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        loader = self.get_eval_dataloader(dataset)
        self.callback_handler.eval_dataloader = loader
        began = time.perf_counter()
        with self.stopwatch.paused():
            loss_sum, num_labels = self._sum_losses(loader)
        loss = loss_sum / num_labels
        metrics = {
            f"{metric_key_prefix}_loss": loss,
            f"{metric_key_prefix}_perplexity": math.exp(min(loss, 700.0)),
            f"{metric_key_prefix}_bits_per_char": loss_sum / math.log(2) / sum(dataset["num_chars"]),
            f"{metric_key_prefix}_runtime": time.perf_counter() - began,
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def _sum_losses(self, loader) -> tuple[float, float]:
        """(sum of losses in nats, number of labels) over all processes."""
        model = self.model_wrapped
        model.eval()
        totals = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        for inputs in loader:
            inputs = self._prepare_inputs(inputs)
            num_labels = (inputs["labels"][:, 1:] != IGNORED).sum()
            mean_loss = model(**inputs).loss.double()
            totals += torch.stack([torch.where(num_labels > 0, mean_loss * num_labels, 0.0), num_labels.double()])
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        return tuple(self.accelerator.reduce(totals, reduction="sum").tolist())

    def _save(self, output_dir=None, state_dict=None):
        """DeepSpeed hands over copies in which tied weights are two tensors; one is enough on disk."""
        if state_dict:
            tied = getattr(self.model, "all_tied_weights_keys", {})
            state_dict = {name: weight for name, weight in state_dict.items() if name not in tied}
        super()._save(output_dir, state_dict)

    def _save_checkpoint(self, *args, **kwargs):
        with self.stopwatch.paused():
            super()._save_checkpoint(*args, **kwargs)

    def save_best(self) -> None:
        """Puts the best model at the top of the run's folder; where no best was kept, the model as it is."""
        best = self.state.best_model_checkpoint
        if best is None or not Path(best).is_dir():
            self.save_model()
        elif self.is_world_process_zero():
            promote(best, self.args.output_dir)

    def results(self) -> dict[str, float]:
        """The figures of a finished run, those of the model that `save_best` saved. Collective.

        `train_tokens_per_second`: real tokens, all processes; `train_peak_device_bytes`: on the fullest
        device; `train_peak_host_bytes`: all processes together.
        """
        device_bytes = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        peaks = self.accelerator.gather(torch.tensor([[device_bytes, peak_host_bytes()]], device=self.args.device))
        figures = {
            "train_tokens_per_second": self._total_tokens() / max(self.stopwatch.seconds(), 1e-9),
            "train_peak_device_bytes": peaks[:, 0].max().item(),
            "train_peak_host_bytes": peaks[:, 1].sum().item(),
            "epoch": self.state.epoch,
            "global_step": self.state.global_step,
        }
        evaluations = [line for line in self.state.log_history if "eval_loss" in line]
        if evaluations:
            saved = [line for line in evaluations if line["step"] == self.state.best_global_step] or evaluations
            figures |= {key: value for key, value in saved[-1].items() if key.startswith("eval_")}
            figures |= {"perplexity": saved[-1]["eval_perplexity"], "saved_step": saved[-1]["step"]}
            if evaluations[0]["step"] == 0:
                figures["untouched_perplexity"] = evaluations[0]["eval_perplexity"]
        return figures

    def _total_tokens(self) -> int:
        mine = torch.as_tensor(self.num_tokens, device=self.args.device)
        return int(self.accelerator.reduce(mine, reduction="sum").item())
