"""Hugging Face's Trainer on DeepSpeed, with losses and speed per token and with complete checkpoints."""

import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils import DummyOptim
from transformers import ProgressCallback, Trainer
from transformers.utils import logging

from neoflix.checkpoints.names import UNIVERSAL
from neoflix.checkpoints.ownership import temporary
from neoflix.checkpoints.start import Start, check_progress
from neoflix.data.fields import FieldPool
from neoflix.data.packing import PackedCollator, PaddedCollator
from neoflix.model.checkpointing import recompute_first_layers
from neoflix.model.lora import collect_adapters, has_adapters, save_adapters
from neoflix.model.vocabulary import keeps_texts_apart
from neoflix.planning.forecast import Plan
from neoflix.planning.table import compare
from neoflix.reporting.write import write_report
from neoflix.runtime.console import say
from neoflix.runtime.errors import StoppedEarly
from neoflix.runtime.files import without_wildcards
from neoflix.runtime.processes import gather, run_on_main_process
from neoflix.runtime.watchdog import announce_activity
from neoflix.training import saving
from neoflix.training.batches import data_seed, load_token_batches, shuffled_order, token_batches, with_own_generator
from neoflix.training.callbacks import RecordStart, StopOnRequest, describe_start, run_callbacks
from neoflix.training.compact_adamw import CompactAdamW
from neoflix.training.deepspeed import (
    adjust_engine,
    gather_weights_on_save,
    measure_norm_first,
    naming_refused_values,
)
from neoflix.training.divergence import check_finite
from neoflix.training.live_samples import ShowSamples
from neoflix.training.meters import Meters, explaining_full_memory
from neoflix.training.parameter_groups import check_groups, group_parameters
from neoflix.training.resuming import fit_to_processes, read_hyperparameters, restore_settings
from neoflix.training.validation import is_evaluated, measure_loss, saved_model_figures


class TokenTrainer(Trainer):
    """A Trainer whose evaluation loss is the mean over tokens, whose speed is in tokens, and whose checkpoints are
    complete or do not count. (Trainer's own evaluation averages over rows, and a batch of packed texts is one row.)

    Args:
        plan: the forecast of memory and time that the run is compared with.
        field_pool: what the fields of live samples are drawn from, for a template.
    """

    def __init__(self, model, plan: Plan | None = None, field_pool: FieldPool | None = None, **kwargs):
        self.plan = plan
        is_packed = keeps_texts_apart(model)
        collator = PackedCollator() if is_packed else PaddedCollator(kwargs["processing_class"].pad_token_id)
        super().__init__(model, **{"data_collator": collator, **kwargs})
        self.meters = Meters(self.accelerator, plan)
        self._activity = "starting"
        self._order = None  # of the texts: a sampler or a batch sampler
        self._losses_are_finite = torch.tensor(True, device=self.args.device)
        self._hyperparameters: list[dict] = []  # of the optimizer's groups, as this start's arguments set them
        self._saved_step: int | None = None  # of the model at the top of the run's folder
        self._universal: Path | None = None  # where a checkpoint's form for this number of processes is kept
        self._stop = StopOnRequest()
        self.add_callback(self._stop)
        self.remove_callback(ProgressCallback)  # replaced by our own
        for callback in run_callbacks(self.args, has_validation=bool(self.eval_dataset)):
            self.add_callback(callback)
        if self.args.num_progress_samples and not self.args.eval_only:
            self.add_callback(ShowSamples(self.callback_handler.callbacks, field_pool))

    def create_model_card(self, *args, **kwargs):
        """Replaces Trainer's card, because `reporting/card.py` writes README.md."""

    def train(self, start: Start):
        """Trains, from the beginning or from the checkpoint that `start` names.

        Args:
            start: by `find_start`. It is recorded in the run's folder once the first step is taken.

        Raises:
            StoppedEarly: where the run was asked to stop and has saved a checkpoint.
            UserError: with the plan, where memory did not suffice; or where a start that changes a run took no step.
        """
        logging.disable_progress_bar()  # transformers' own, one for each save
        self._changes, checkpoint = start.changes, start.checkpoint
        run_on_main_process(saving.check_space_for_all, self.args, self.model)
        facts = describe_start(self.args, self.plan, self.model, self.eval_dataset, start.from_step)
        self.add_callback(RecordStart(start.run, facts))
        if checkpoint:
            self.args.eval_on_start = False
            say(f"Resuming from {checkpoint}")
            checkpoint = self._find_loadable(Path(checkpoint))
        announce_activity(lambda: f"{self._activity}, step {self.state.global_step}, {time.strftime('%H:%M:%S')}")
        refusals = naming_refused_values(self.args.deepspeed)
        with explaining_full_memory(self.plan), refusals, without_wildcards(checkpoint) as readable:
            output = super().train(readable and str(readable))
        if self._stop.reason:
            step, reason = self.state.global_step, self._stop.reason
            run_on_main_process(write_report, self.args.output_dir)
            raise StoppedEarly(f"Stopped after step {step} ({reason}); the same command resumes from there")
        check_progress(start, self.state.global_step, self.state.max_steps)
        return output

    def _find_loadable(self, checkpoint: Path) -> Path:
        config = self.accelerator.state.deepspeed_plugin.deepspeed_config
        if "optimizer" in config:
            check_groups(checkpoint, len(self._group_parameters()))
        self._universal = temporary(Path(self.args.output_dir), checkpoint.name, UNIVERSAL)
        return fit_to_processes(checkpoint, self._universal, self.model, config, self.args.world_size)

    def _run_epoch(self, *args, **kwargs):
        """Trainer's own, or nothing where the resumed run had ended already."""
        self._activity = "training"
        if hasattr(self._order, "set_epoch"):  # after a resume, accelerate does not reach it under the skipped batches
            self._order.set_epoch(kwargs["epoch"])
        adjust_engine(self.model_wrapped)
        recompute_first_layers(self.model, self.args.recomputed_layers)
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    @contextmanager
    def _busy(self, activity: str):
        """Stops the clock for something other than training, and names it for the watchdog."""
        before, self._activity = self._activity, activity
        with self.meters.stopwatch.paused():
            yield
        self._activity = before

    # Optimizer and schedule

    def create_optimizer(self, model=None):
        """Trainer's own with our groups, also where DeepSpeed makes it; or `CompactAdamW`."""
        if self.args.uses_compact_adamw and self.optimizer is None:
            self.optimizer = CompactAdamW.from_arguments(self._group_parameters(), self.args)
        if isinstance(self.optimizer, DummyOptim):
            self.optimizer.params = self._group_parameters()
        return super().create_optimizer(model)

    def _group_parameters(self) -> list[dict]:
        return group_parameters(self.model, self.get_decay_parameter_names(self.model), self.args.weight_decay)

    def _init_training_state(self, max_steps, *args, **kwargs):
        """Trainer's own, with this start's intervals of logs, evaluations and saves, not the checkpoint's."""
        trained = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)
        return trained

    def create_scheduler(self, num_training_steps, optimizer=None):
        """Trainer's own, called once the optimizer is made and before a checkpoint is loaded."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        optimizer = optimizer or self.optimizer
        if hasattr(optimizer, "param_groups"):  # not the placeholder for the one that DeepSpeed makes
            # In place: for DeepSpeed's optimizer transformers calls this on a shallow copy of the trainer.
            self._hyperparameters[:] = read_hyperparameters(optimizer)
        return scheduler

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            restore_settings(self.optimizer, self.lr_scheduler, self._hyperparameters, bool(self._changes))
            gather(None)  # all have read it
            if self.is_world_process_zero():
                shutil.rmtree(self._universal, ignore_errors=True)

    # Batches and steps

    def get_train_dataloader(self):
        """Trainer's own, or batches by their tokens with `--tokens_per_device_batch`."""
        if self.args.tokens_per_device_batch is None:
            return with_own_generator(super().get_train_dataloader())
        self._order = token_batches(self.train_dataset, self.args)
        return with_own_generator(load_token_batches(self.train_dataset, self._order, self.data_collator, self.args))

    def get_eval_dataloader(self, eval_dataset=None):
        return with_own_generator(super().get_eval_dataloader(eval_dataset))

    def _get_train_sampler(self, train_dataset=None):
        self._order = shuffled_order(self.train_dataset, self.args)
        if self._order is None:
            self._order = super()._get_train_sampler(train_dataset)
            if hasattr(self._order, "seed"):  # batch_rebalance
                self._order.seed = data_seed(self.args)
        return self._order

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.meters.count(inputs)
        loss = super().training_step(model, measure_norm_first(self, inputs, num_items_in_batch), num_items_in_batch)
        self._losses_are_finite = self._losses_are_finite & torch.isfinite(loss)  # on the device: no sync
        return loss

    def log(self, logs, start_time=None):
        """Trainer's own. Training steps also have the figures of `Meters.read_interval` and, in fp16, the number of
        steps skipped so far."""
        if "loss" in logs:
            logs |= self.meters.read_interval()
            if self.args.fp16:
                logs["skipped_steps"] = self.model_wrapped.skipped_steps
        super().log(logs, start_time)

    # Evaluation

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Returns `{prefix}_loss`, `_perplexity` and `_bits_per_char` by `measure_loss`, and `_runtime` in seconds."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        loader = self.get_eval_dataloader(dataset)
        self.callback_handler.eval_dataloader = loader
        began = time.perf_counter()
        with self._busy("evaluating"):
            figures = measure_loss(self, loader, sum(dataset["num_chars"]))
        figures["runtime"] = time.perf_counter() - began
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        self.log(metrics)
        with self._busy("writing samples"):
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # Checkpoints and results

    def save_model(self, output_dir=None, _internal_call=False):
        """Writes model and tokenizer, at every ZeRO stage whole; with LoRA the adapters alone. Collective."""
        if not has_adapters(self.model):
            gather_weights_on_save(self.model_wrapped)
            super().save_model(output_dir, _internal_call)
            return
        weights, folder = collect_adapters(self.model), Path(output_dir or self.args.output_dir)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            save_adapters(self.model, weights, folder)
            self.processing_class.save_pretrained(folder)

    def _save(self, output_dir=None, state_dict=None):
        """DeepSpeed returns tied weights as two tensors; one is enough on disk."""
        if state_dict:
            tied = self.model.all_tied_weights_keys
            state_dict = {name: weight for name, weight in state_dict.items() if name not in tied}
        super()._save(output_dir, state_dict)

    def _save_checkpoint(self, model, trial=None):
        """As `saving.save_checkpoint`. DivergedError where a loss or a weight is not finite. Collective."""
        check_finite(self.args, self.state.global_step, self._losses_are_finite, self.model)
        with self._busy(f"saving checkpoint-{self.state.global_step}"):
            self.store_flos()
            saving.save_checkpoint(self)

    def save_best(self) -> None:
        """Puts the best evaluated model at the top of the run's folder. The last model is evaluated first if it was
        not. DivergedError where a weight is not finite. Collective."""
        check_finite(self.args, self.state.global_step, self._losses_are_finite, self.model)
        if self.eval_dataset and not is_evaluated(self.state):
            self.evaluate()
        self._saved_step = saving.save_best(self)

    def results(self) -> dict[str, float]:
        """The figures of a finished run; those of the model are of the one that `save_best` saved. Collective."""
        figures = self.meters.read_total()
        figures |= {"epoch": self.state.epoch, "global_step": self.state.global_step}
        if self.plan:
            words, planned = compare(self.plan, figures["train_peak_device_bytes"], figures["train_peak_host_bytes"])
            figures |= planned
            say(words)
        return figures | saved_model_figures(self.state, self._saved_step)
