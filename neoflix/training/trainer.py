"""Hugging Face's Trainer, counting in tokens where it counts in batches and rows, and losing nothing."""

import dataclasses
import math
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import DummyOptim
from torch.utils.data import DataLoader
from transformers import ProgressCallback, Trainer
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from neoflix.checkpoints.find import forecast_bytes, list_checkpoints
from neoflix.checkpoints.gather import gather_weights
from neoflix.checkpoints.manifest import Files, find_corruption, num_bytes, read_manifest, write_manifest
from neoflix.checkpoints.names import STATE_FILE, UNIVERSAL
from neoflix.checkpoints.ownership import check_held
from neoflix.checkpoints.runs import Start, check_progress
from neoflix.checkpoints.store import check_space, commit, export_best, prune, read_list, temporary
from neoflix.checkpoints.world_size import check_loadable, convert, needs_conversion
from neoflix.data.fields import FieldPool
from neoflix.data.packing import IGNORE_INDEX, EpochOrder, PackedCollator, PaddedCollator, TokenBatches
from neoflix.data.tokens import count_tokens
from neoflix.model.folder import WEIGHTS_FILES
from neoflix.model.lora import check_spare_rows, collect_adapters, has_adapters, save_adapters
from neoflix.model.vocabulary import keeps_texts_apart
from neoflix.planning.forecast import Plan
from neoflix.planning.remedies import explain_failure
from neoflix.planning.table import compare
from neoflix.reporting.write import write_report
from neoflix.runtime.console import say
from neoflix.runtime.errors import DivergedError, StoppedEarly, UserError
from neoflix.runtime.files import without_wildcards, write_json
from neoflix.runtime.processes import any_across_ranks, gather, run_on_main_process
from neoflix.runtime.redaction import redact
from neoflix.runtime.watchdog import announce_activity
from neoflix.training.callbacks import EvaluateAtEnd, RecordStart, StopOnRequest, is_evaluated, run_callbacks
from neoflix.training.deepspeed import keep_gradient_norm, naming_refused_values
from neoflix.training.divergence import diverged, has_finite_weights
from neoflix.training.live_samples import ShowSamples
from neoflix.training.meters import Stopwatch, peak_host_bytes
from neoflix.training.optimizer import check_groups, group_parameters
from neoflix.training.resumed_optimizer import (
    apply_hyperparameters,
    read_hyperparameters,
    restore_adam_beta_powers,
    restore_weight_decay,
)


def _without_secrets(state: dict) -> dict:
    """What DeepSpeed is about to save, which holds its configuration: a monitor's key may stand there."""
    return state | {"ds_config": redact(state["ds_config"])} if "ds_config" in state else state


def with_own_generator(loader):
    """The loader, which draws its workers' seeds from a generator of its own: from torch's, each new iterator would
    shift the draws of dropout, and a resumed run makes others than one that was never interrupted."""
    loader.base_dataloader.generator = torch.Generator()
    return loader


class TokenTrainer(Trainer):
    """A Trainer whose evaluation loss is the mean over tokens, whose speed is in tokens, and whose checkpoints
    are complete or do not count.

    Trainer's own evaluation averages batches by their number of rows; a batch of packed texts is one row,
    however many tokens it holds, so that its mean is not the loss per token. Tokens are those the model
    reads, padding left out; the clock stands still while the run evaluates or saves.
    """

    def __init__(self, model, plan: Plan | None = None, field_pool: FieldPool | None = None, **kwargs):
        self.plan = plan
        is_packed = keeps_texts_apart(model)
        collator = PackedCollator() if is_packed else PaddedCollator(kwargs["processing_class"].pad_token_id)
        super().__init__(model, **{"data_collator": collator, **kwargs})
        self.stopwatch = Stopwatch()
        self.num_tokens = 0  # this process's, since the start; becomes a tensor with padded batches: no sync
        self._last_log = (0, 0.0)
        self._doing = "starting"
        self._losses_are_finite = torch.tensor(True, device=self.args.device)
        self._hyperparameters: list[dict] = []  # of the optimizer's groups, as this start's arguments set them
        self._saved_step: int | None = None  # of the model at the top of the run's folder
        self._converted: Path | None = None  # a checkpoint's form for this number of processes
        self._stop = StopOnRequest()
        self.add_callback(self._stop)
        self.remove_callback(ProgressCallback)  # ours takes its place
        for callback in run_callbacks(self.args):
            self.add_callback(callback)
        if self.eval_dataset:
            self.add_callback(EvaluateAtEnd())
        if self.args.num_progress_samples and not self.args.eval_only:
            self.add_callback(ShowSamples(self._find_tensorboard, field_pool))

    def _find_tensorboard(self):
        """TensorBoard's writer, where curves go there."""
        callbacks = self.callback_handler.callbacks
        return next((each.tb_writer for each in callbacks if isinstance(each, TensorBoardCallback)), None)

    def create_model_card(self, *args, **kwargs):
        """Not Trainer's: `report.py` writes README.md."""

    def train(self, start: Start):
        """Trainer's own. StoppedEarly where the run was asked to stop and has saved itself; UserError, with the plan,
        where memory did not suffice, or where a start that changes a run took no step.

        Args:
            start: what is resumed and what changes, by `runs.find_start`. Recorded once the first step is taken.
        """
        logging.disable_progress_bar()  # transformers' own, one for each save
        self._changes, checkpoint = start.changes, start.checkpoint
        run_on_main_process(self._check_space_for_all)
        self.add_callback(RecordStart(start.run, self._describe_start(start.from_step)))
        if checkpoint:
            self.args.eval_on_start = False
            say(f"Resuming from {checkpoint}")
            checkpoint = self._fit_to_processes(Path(checkpoint))
        announce_activity(lambda: f"{self._doing}, step {self.state.global_step}, {time.strftime('%H:%M:%S')}")
        refusals = naming_refused_values(self.args.deepspeed)
        with self._explaining_full_memory(), refusals, without_wildcards(checkpoint) as readable:
            output = super().train(readable and str(readable))
        if self._stop.reason:
            step, reason = self.state.global_step, self._stop.reason
            run_on_main_process(write_report, self.args.output_dir)
            raise StoppedEarly(f"Stopped after step {step} ({reason}); the same command goes on from there")
        check_progress(start, self.state.global_step, self.state.max_steps)
        return output

    def _describe_start(self, from_step: int) -> dict:
        args, plan = self.args, self.plan
        num_chars = self.eval_dataset["num_chars"] if self.eval_dataset else []
        return {
            "command": args.command,
            "from_step": from_step,
            "num_processes": args.world_size,
            "deepspeed": Path(args.deepspeed).name if isinstance(args.deepspeed, str) else "given in the command",
            "precision": str(args.weight_dtype).removeprefix("torch."),
            "num_parameters": sum(getattr(weight, "ds_numel", weight.numel()) for weight in self.model.parameters()),
            "num_validation_texts": sum(chars > 0 for chars in num_chars),
            "plan_seconds": plan and plan.seconds(),
        }

    def _fit_to_processes(self, checkpoint: Path) -> Path:
        """The checkpoint or, where it was saved by another number of processes, its universal form. Collective."""
        config = self.accelerator.state.deepspeed_plugin.deepspeed_config
        check_spare_rows(self.model, checkpoint)
        check_loadable(checkpoint, config.get("zero_optimization", {}), self.args.world_size)
        if "optimizer" in config:
            check_groups(checkpoint, len(self._group_parameters()))
        if not needs_conversion(checkpoint, self.args.world_size):
            return checkpoint
        config.setdefault("checkpoint", {})["load_universal"] = True
        self._converted = temporary(Path(self.args.output_dir), checkpoint.name, UNIVERSAL)
        return run_on_main_process(convert, checkpoint, self._converted)

    @contextmanager
    def _explaining_full_memory(self):
        """Out of memory: UserError, with the plan beside the allocator's figures and what to change."""
        try:
            yield
        except RuntimeError as error:  # torch.OutOfMemoryError is one; of the host's memory there is no class
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            raise UserError(explain_failure(self.plan, str(error), *self._allocated())) from error

    def _allocated(self) -> tuple[int, int, int]:
        """(bytes at the peak that torch handed out on this device, that it held, that this process had of the host)"""
        if not torch.cuda.is_available():
            return 0, 0, peak_host_bytes()
        return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved(), peak_host_bytes()

    def _run_epoch(self, *args, **kwargs):
        """Not one step more where the run that is resumed had come to its end already."""
        self._doing = "training"
        if hasattr(self._order, "set_epoch"):  # accelerate does not reach it below the batches that a resume skips
            self._order.set_epoch(kwargs["epoch"])
        keep_gradient_norm(self.model_wrapped)
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def create_optimizer(self, model=None):
        """Trainer's own or, where DeepSpeed is to make the optimizer, Trainer's parameter groups for it."""
        if isinstance(self.optimizer, DummyOptim):
            self.optimizer.params = self._group_parameters()
        return super().create_optimizer(model)

    def _group_parameters(self) -> list[dict]:
        return group_parameters(self.model, self.get_decay_parameter_names(self.model), self.args.weight_decay)

    def _init_training_state(self, max_steps, *args, **kwargs):
        """Logs, evaluates and saves as often as this start says; Trainer goes on as the checkpoint did."""
        trained = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)
        return trained

    def create_scheduler(self, num_training_steps, optimizer=None):
        """Trainer's own, called once the optimizer is made and before a checkpoint is loaded."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        optimizer = optimizer or self.optimizer
        if hasattr(optimizer, "param_groups"):  # not a stand-in for the one that DeepSpeed makes
            # In place: for DeepSpeed's optimizer transformers calls this on a shallow copy of the trainer.
            self._hyperparameters[:] = read_hyperparameters(optimizer)
        return scheduler

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            restore_adam_beta_powers(self.optimizer)
            restore_weight_decay(self.optimizer, self._hyperparameters)
            if self._changes:
                apply_hyperparameters(self.optimizer, self.lr_scheduler, self._hyperparameters)
            gather(None)  # all have read it
            if self.is_world_process_zero() and self._converted:
                shutil.rmtree(self._converted)

    def get_train_dataloader(self):
        """Trainer's own, or batches by their tokens where `--tokens_per_device_batch` asks for them."""
        loader = super().get_train_dataloader() if self.args.tokens_per_device_batch is None else self._load_by_tokens()
        return with_own_generator(loader)

    def get_eval_dataloader(self, eval_dataset=None):
        return with_own_generator(super().get_eval_dataloader(eval_dataset))

    def _load_by_tokens(self) -> DataLoader:
        args = self.args
        self._order = TokenBatches(
            count_tokens(self.train_dataset),
            args.tokens_per_device_batch,
            args.gradient_accumulation_steps * args.world_size,
            args.process_index,
            args.world_size,
            self._data_seed,
        )
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=self._order,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
        )
        # Not accelerator.prepare: that would deal out once more what is this process's share already.
        return prepare_data_loader(loader, args.device, num_processes=1, process_index=0, put_on_device=True)

    def _get_train_sampler(self, train_dataset=None):
        """Trainer's samplers draw from torch's own generator: after a resume their order would be another one."""
        strategy = getattr(self.args, "train_sampling_strategy", "random")
        if strategy in ("random", "group_by_length"):
            lengths_N, by_length = count_tokens(self.train_dataset), strategy == "group_by_length"
            self._order = EpochOrder(lengths_N, self.args.texts_per_step, self._data_seed, by_length)
            return self._order
        self._order = super()._get_train_sampler(train_dataset)
        if hasattr(self._order, "seed"):  # batch_rebalance
            self._order.seed = self._data_seed
        return self._order

    @property
    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.stopwatch.start()
        is_packed = "position_ids" in inputs
        self.num_tokens = self.num_tokens + (
            inputs["input_ids"].numel() if is_packed else inputs["attention_mask"].sum()
        )
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._losses_are_finite = self._losses_are_finite & torch.isfinite(loss)  # on the device: no sync
        return loss

    def _check_finite(self) -> None:
        """DivergedError, in every process, where a loss so far or a weight is not finite. Collective."""
        step = self.state.global_step
        if any_across_ranks(not bool(self._losses_are_finite)):
            raise diverged(self.args, step, "a loss since the last checkpoint is NaN or infinite")
        if any_across_ranks(not has_finite_weights(self.model)):
            raise diverged(self.args, step, "weights are NaN or infinite")

    def log(self, logs, start_time=None):
        """Adds to the log of training steps: tokens/s of all processes since the last line and, where the device's peak
        is known, what share of it that is; peaks of memory; of fp16, how many steps were skipped so far."""
        if "loss" in logs:
            num_tokens, seconds = self._total_tokens(), self.stopwatch.seconds()
            last_tokens, last_seconds = self._last_log
            speed = logs["tokens_per_second"] = (num_tokens - last_tokens) / max(seconds - last_seconds, 1e-9)
            self._last_log = (num_tokens, seconds)
            if self.plan and (mfu := self.plan.utilization(speed)) is not None:
                logs["mfu"] = mfu
            device_bytes, logs["peak_host_bytes"] = self._peak_bytes()
            if device_bytes:
                logs["peak_device_bytes"] = device_bytes
            if self.args.fp16:
                logs["skipped_steps"] = self.model_wrapped.skipped_steps
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
        with self._busy("evaluating"):
            loss_sum, num_labels = self._sum_losses(loader)
        loss = loss_sum / num_labels
        if not math.isfinite(loss):
            if self.args.eval_only:
                raise DivergedError(f"{self.args.model_name_or_path}: the loss on the held-out texts is {loss}")
            raise diverged(self.args, self.state.global_step, f"the loss on the held-out texts is {loss}")
        metrics = {
            f"{metric_key_prefix}_loss": loss,
            f"{metric_key_prefix}_perplexity": math.exp(min(loss, 700.0)),
            f"{metric_key_prefix}_bits_per_char": loss_sum / math.log(2) / sum(dataset["num_chars"]),
            f"{metric_key_prefix}_runtime": time.perf_counter() - began,
        }
        self.log(metrics)
        with self._busy("writing samples"):
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
            num_labels = (inputs["labels"][:, 1:] != IGNORE_INDEX).sum()
            mean_loss = model(**inputs).loss.double()
            totals += torch.stack([torch.where(num_labels > 0, mean_loss * num_labels, 0.0), num_labels.double()])
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        return tuple(self.accelerator.reduce(totals, reduction="sum").tolist())

    def save_model(self, output_dir=None, _internal_call=False):
        """Trainer's own; with LoRA the adapters alone, whole at every ZeRO stage. Collective."""
        if not has_adapters(self.model):
            super().save_model(output_dir, _internal_call)
            return
        weights, folder = collect_adapters(self.model), Path(output_dir or self.args.output_dir)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            save_adapters(self.model, weights, folder)
            self.processing_class.save_pretrained(folder)

    def _save(self, output_dir=None, state_dict=None):
        """DeepSpeed hands over copies in which tied weights are two tensors; one is enough on disk."""
        if state_dict:
            tied = getattr(self.model, "all_tied_weights_keys", {})
            state_dict = {name: weight for name, weight in state_dict.items() if name not in tied}
        super()._save(output_dir, state_dict)

    @contextmanager
    def _busy(self, doing: str):
        """Something else than training: the clock stands still."""
        before, self._doing = self._doing, doing
        with self.stopwatch.paused():
            yield
        self._doing = before

    def _save_checkpoint(self, model, trial=None):
        """Writes `checkpoint-N`, all of it or nothing, then deletes those beyond `--save_total_limit`. Collective.

        DivergedError where a loss or a weight is not finite. UserError in every process where it cannot be written,
        `--on_full_disk go_on` excepted; earlier checkpoints are not touched before this one is complete.
        """
        self._check_finite()
        run, step = Path(self.args.output_dir), self.state.global_step
        unfinished = temporary(run, f"checkpoint-{step}", ".part")
        with self._busy(f"saving checkpoint-{step}"):
            self.store_flos()
            run_on_main_process(check_held, run)
            try:
                run_on_main_process(self._begin_checkpoint, unfinished)
                self._write_checkpoint(unfinished)
            except UserError as error:
                run_on_main_process(lambda: shutil.rmtree(unfinished, ignore_errors=True))
                if self.args.on_full_disk == "stop":
                    raise UserError(
                        f"{error}. The run's earlier checkpoints are whole; the same command goes on"
                    ) from None
                say(f"warning: {error}; going on without checkpoint-{step}")
                return
            run_on_main_process(lambda: prune(run, self.args.save_total_limit, self._find_best_step()))

    def _begin_checkpoint(self, unfinished: Path) -> None:
        check_space(unfinished.parent, self._checkpoint_bytes(), "the next checkpoint takes")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)

    def _write_checkpoint(self, folder: Path) -> None:
        files, engine = Files(folder), self.model_wrapped
        with files.remembering_errors():
            self._save_weights(folder)
        engine.checkpoint_engine.save = lambda state_dict, path: files.save(_without_secrets(state_dict), path)
        engine._copy_recovery_script = lambda *_: None  # rank 0 alone would write it, and could fail alone
        is_adapted = has_adapters(self.model)  # the base's frozen weights lie where they came from
        engine.save_checkpoint(str(folder), save_latest=False, exclude_frozen_parameters=is_adapted)  # "latest": below
        with files.remembering_errors():
            self._save_rng_state(str(folder))
            if self.is_world_process_zero():
                files.save(self.lr_scheduler.state_dict(), folder / "scheduler.pt")
                (folder / "latest").write_text(f"global_step{engine.global_steps}")
                self._save_state(folder)
        errors = [error for error in gather(files.error) if error]
        entries = {name: entry for part in gather(files.entries) for name, entry in part.items()}
        run_on_main_process(self._complete_checkpoint, folder, errors, entries)

    def _save_weights(self, folder: Path) -> None:
        """Model and tokenizer; but no weights where ZeRO-3 is told not to gather them for a save: DeepSpeed's shards
        hold them (Trainer would save those as well, a first time)."""
        engine = self.model_wrapped
        is_whole = not engine.zero_optimization_partition_weights() or has_adapters(self.model)
        if is_whole or engine.zero_gather_16bit_weights_on_model_save():
            self.save_model(str(folder), _internal_call=True)
            return
        self._save(str(folder), state_dict={})
        if self.args.should_save:
            (folder / WEIGHTS_FILES[0]).unlink(missing_ok=True)  # an empty one, by some versions of transformers

    def _save_state(self, folder: Path) -> None:
        for stateful in (*self.callback_handler.callbacks, self.control):
            if isinstance(stateful, ExportableState):
                self.state.stateful_callbacks[type(stateful).__name__] = stateful.state()
        write_json(folder / STATE_FILE, dataclasses.asdict(self.state))

    def _complete_checkpoint(self, folder: Path, errors: list[str], entries: dict) -> None:
        facts = {
            "run": read_list(folder.parent)["id"],
            "step": self.state.global_step,
            "best_step": self._find_best_step(self.state.global_step),
            "num_processes": self.args.world_size,
            "zero_stage": self.model_wrapped.zero_optimization_stage(),
            "optimizer_groups": len(self.optimizer.param_groups),
        }
        try:
            if errors:
                raise OSError(0, errors[0])
            write_manifest(folder, facts, entries)
            commit(folder)
        except OSError as error:
            name = f"checkpoint-{self.state.global_step}"
            raise UserError(f"{folder.parent / name} could not be written ({error.strerror})") from error

    def _rank_steps(self) -> list[int]:
        """The steps at which the model was evaluated, the best first."""
        if self.args.metric_for_best_model is None:
            return []
        metric = "eval_" + self.args.metric_for_best_model.removeprefix("eval_")
        scores = {line["step"]: line[metric] for line in self.state.log_history if metric in line}
        scores = {step: score for step, score in scores.items() if step > 0 and math.isfinite(score)}
        return sorted(scores, key=scores.get, reverse=bool(self.args.greater_is_better))

    def _find_best_step(self, *more_steps: int) -> int | None:
        """The step of the best evaluated checkpoint among those that are complete, and `more_steps`."""
        saved = {read_manifest(path)["step"] for path in list_checkpoints(Path(self.args.output_dir))} | {*more_steps}
        return next((step for step in self._rank_steps() if step in saved), None)

    def _checkpoint_bytes(self) -> int:
        """What one checkpoint takes: what the last one took or, before there is one, a forecast."""
        if earlier := list_checkpoints(Path(self.args.output_dir)):
            return num_bytes(earlier[-1])
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        num_weights = sum(getattr(weight, "ds_numel", weight.numel()) for weight in weights)
        return forecast_bytes(num_weights, weights[0].element_size())

    def _check_space_for_all(self) -> None:
        """UserError where the disk cannot hold the checkpoints that will lie there side by side."""
        args, run = self.args, Path(self.args.output_dir)
        if args.save_strategy == "no":
            return
        num_kept = (args.save_total_limit or 1) + 1  # a new one is complete before an old one is deleted
        missing = num_kept - len(list_checkpoints(run))
        check_space(
            run, max(missing, 1) * self._checkpoint_bytes(), f"{num_kept} checkpoints side by side need another"
        )

    def save_best(self) -> None:
        """Puts the best evaluated model at the top of the run's folder, whole; without held-out texts, the last one.
        Beside it the run's history. The last model is evaluated first if it was not. DivergedError where its weights
        are not finite. Collective."""
        self._check_finite()
        if self.eval_dataset and not is_evaluated(self.state):
            self.evaluate()
        self._saved_step, best = run_on_main_process(self._choose_best)
        if best is None:
            best = temporary(Path(self.args.output_dir), "model", ".part")
            self.model_wrapped._config.zero_config.gather_16bit_weights_on_model_save = True
            self.save_model(str(best))
        run_on_main_process(self._export_best, best)
        run_on_main_process(write_json, Path(self.args.output_dir, STATE_FILE), dataclasses.asdict(self.state))

    def _choose_best(self) -> tuple[int, Path | None]:
        """(step, checkpoint) of the best model that is still there, every file of it read; no checkpoint: the model in
        memory."""
        checkpoints = {read_manifest(path)["step"]: path for path in list_checkpoints(Path(self.args.output_dir))}
        last = self.state.global_step
        for step in [*self._rank_steps(), last]:
            if step == last and step not in checkpoints:
                break
            if step not in checkpoints:
                continue
            damage = find_corruption(checkpoints[step], checksums=True)
            if damage is None:
                return step, checkpoints[step]
            say(f"warning: {checkpoints[step]} is not used as the best model: {damage}")
        return last, None

    def _export_best(self, checkpoint: Path) -> None:
        run = Path(self.args.output_dir)
        check_held(run)
        gather_weights(checkpoint)
        export_best(checkpoint, run)
        if checkpoint == temporary(run, "model", ".part"):
            shutil.rmtree(checkpoint)

    def results(self) -> dict[str, float]:
        """The figures of a finished run, those of the model that `save_best` saved. Collective.

        `train_tokens_per_second`: real tokens, all processes; `train_peak_device_bytes`: on the fullest
        device; `train_peak_host_bytes`: all processes together.
        """
        device_bytes, host_bytes = self._peak_bytes()
        figures = {
            "train_tokens_per_second": self._total_tokens() / max(self.stopwatch.seconds(), 1e-9),
            "train_peak_device_bytes": device_bytes,
            "train_peak_host_bytes": host_bytes,
            "epoch": self.state.epoch,
            "global_step": self.state.global_step,
        }
        if self.plan:
            words, planned = compare(self.plan, figures["train_peak_device_bytes"], figures["train_peak_host_bytes"])
            figures |= planned
            say(words)
        evaluations = [line for line in self.state.log_history if "eval_loss" in line]
        if evaluations and evaluations[0]["step"] == 0:
            figures["untouched_perplexity"] = evaluations[0]["eval_perplexity"]
        if saved := [line for line in evaluations if line["step"] == self._saved_step]:
            figures |= {key: value for key, value in saved[-1].items() if key.startswith("eval_")}
            figures |= {"perplexity": saved[-1]["eval_perplexity"], "saved_step": self._saved_step}
        return figures

    def _peak_bytes(self) -> tuple[int, int]:
        """(of the fullest device, 0 without a GPU; of the host, all processes together)"""
        device_bytes = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        peaks = self.accelerator.gather(torch.tensor([[device_bytes, peak_host_bytes()]], device=self.args.device))
        return peaks[:, 0].max().item(), peaks[:, 1].sum().item()

    def _total_tokens(self) -> int:
        mine = torch.as_tensor(self.num_tokens, device=self.args.device)
        return int(self.accelerator.reduce(mine, reduction="sum").item())
