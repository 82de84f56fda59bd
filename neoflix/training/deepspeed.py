"""Everything that touches DeepSpeed's internals. Written for deepspeed 0.19.8; check it at each upgrade."""

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from neoflix.arguments.deepspeed_file import TWO_PASSES, is_json, read_ds_config
from neoflix.arguments.training import TrainArguments
from neoflix.planning.device_memory import EXCHANGED
from neoflix.planning.preflight import prebuilt_operators
from neoflix.runtime.console import say
from neoflix.runtime.errors import UserError
from neoflix.runtime.redaction import redact
from neoflix.training.compact_adamw import CompactAdamW, clip_factor


def connect(flags) -> TrainArguments:
    """Prepares DeepSpeed for a run with these flags, and makes the arguments, which connects the run's processes."""
    disable_shm_collectives()
    load_weights_of_safetensors()
    build_operators(read_ds_config(flags.deepspeed))
    return TrainArguments.from_flags(flags)


@contextmanager
def naming_refused_values(source: dict | str | Path) -> Iterator[None]:
    """Turns what DeepSpeed, or transformers on its behalf, refuses about a DeepSpeed file's values into a UserError."""
    from pydantic import ValidationError  # DeepSpeed's; a plan does not need it

    where = f"--deepspeed {source}" if isinstance(source, str | Path) and not is_json(source) else "--deepspeed {...}"
    try:
        yield
    except ValidationError as error:
        if not error.title.startswith("DeepSpeed"):
            raise
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{where}: {key!r} is {first['input']!r}; DeepSpeed says: {first['msg']}") from error
    except ValueError as error:
        begin, *differences = str(error).splitlines()
        if not begin.startswith("Please correct the following DeepSpeed config values"):
            raise
        values = ", ".join(line.removeprefix("- ") for line in differences[:-1])
        raise UserError(f'{where}: values differ from the flags ({values}); set them to "auto"') from error


def build_operators(config: dict) -> None:
    """Compiles the operators that DeepSpeed would compile on first use, so that an error comes before the model is
    loaded; not those that it was installed with. One process of the machine at a time.

    A killed build leaves torch's lock file behind, and every later build waits for it forever. Our own lock (flock)
    ends with the process that holds it; under it, a lock file of torch's that no process has open is removed.
    """
    from deepspeed.accelerator import get_accelerator
    from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder
    from torch.utils.cpp_extension import _get_build_directory

    zero = config.get("zero_optimization", {})
    devices = {zero.get(part, {}).get("device") for part in ("offload_optimizer", "offload_param")}
    builders = [CPUAdamBuilder] if zero.get("offload_optimizer", {}).get("device") in ("cpu", "nvme") else []
    builders += [AsyncIOBuilder] if "nvme" in devices else []
    prebuilt = prebuilt_operators(get_accelerator().device_name())
    for builder in builders:
        if builder.NAME in prebuilt:
            continue
        folder = Path(_get_build_directory(builder.NAME, verbose=False))
        with open(folder / "neoflix.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if (folder / "lock").exists() and not _is_open(folder / "lock"):
                (folder / "lock").unlink()
            if not (folder / f"{builder.NAME}.so").is_file():
                say(f"Compiling DeepSpeed's {builder.NAME} (a minute or two, once)")
            builder().load(verbose=False)


def _is_open(file: Path) -> bool:
    """Whether a process of this machine has the file open."""
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            if descriptor.samefile(file):
                return True
    return False


def disable_shm_collectives() -> None:
    """Makes DeepSpeed start without its shared-memory collectives on a CPU. Call it before the processes connect.

    Training never calls them. But each process compiles them on first use, leaves 69 MB in /dev/shm when it ends
    (300 runs filled the host memory of one machine), and waits forever for a process on another node.
    """
    import deepspeed  # seconds to import: after every check that does not need it

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def adjust_engine(engine) -> None:
    """Changes how an engine reads and exchanges gradients, not what it computes. Repeated calls have no effect."""
    if isinstance(engine.optimizer, CompactAdamW):
        engine.optimizer.allocate_states()
    keep_gradient_norm(engine)
    exchange_small_buckets(engine)
    read_gradients_together(engine)


def keep_gradient_norm(engine) -> None:
    """Makes an engine without ZeRO (stage 0) keep the norm that it clips gradients by, as the other stages do.
    DeepSpeed's own clipping waits for the device twice per parameter; this one does not wait."""

    def clip() -> None:
        gradients = [weight.grad for weight in engine.module.parameters() if weight.grad is not None]
        if not gradients:  # the optimizer has freed them
            return
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
        engine._global_grad_norm, factor = clip_factor(norms, engine.gradient_clipping())
        torch._foreach_mul_(gradients, factor)

    engine.clip_fp32_gradients = clip


def measure_norm_first(trainer, inputs: dict, num_items_in_batch) -> dict:
    """With TWO_PASSES, runs a first pass over a batch, by whose norm the optimizer clips in the second one. Returns the
    batch on the device."""
    if trainer.args.updates_in_backward != TWO_PASSES:
        return inputs
    inputs = trainer._prepare_inputs(inputs)
    trainer.model.train()  # an evaluation may have come before
    compute_loss = partial(trainer.compute_loss, trainer.model, dict(inputs), False, num_items_in_batch)
    trainer.model_wrapped.optimizer.measure_norm(compute_loss)
    return inputs


def exchange_small_buckets(engine) -> None:
    """Makes an engine without ZeRO exchange gradients in buckets of EXCHANGED elements, and one process none at all.

    DeepSpeed copies 5e8 of them at a time, and bf16 gradients once more to fp32: 2.8 GiB, also for one process.
    """
    if engine.zero_optimization_stage() != 0:
        return

    def exchange(grads=None, elements_per_buffer: int = EXCHANGED) -> None:
        if engine.world_size > 1:
            type(engine).buffered_allreduce_fallback(engine, grads, EXCHANGED)

    engine.buffered_allreduce_fallback = exchange


def read_gradients_together(engine) -> None:
    """Makes ZeRO-1 and 2 with an offloaded optimizer read the gradients' norms, and whether they are finite, once per
    step. DeepSpeed reads both for each parameter, and the device stands still each time (776 times per step for
    GPT-Neo-2.7B)."""
    from deepspeed.runtime.utils import has_inf_or_nan
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    optimizer = engine.optimizer
    if not isinstance(optimizer, DeepSpeedZeroOptimizer) or not optimizer.cpu_offload:
        return

    def track_overflow(gradient: torch.Tensor | None) -> None:
        if gradient is not None:
            optimizer.local_overflow = has_inf_or_nan(gradient.data) | optimizer.local_overflow

    def complete_norm(parameters: list) -> torch.Tensor:
        norms = optimizer.norm_for_param_grads
        if norms:
            norms.update(zip(norms, torch.stack(list(norms.values())).cpu(), strict=True))
        return DeepSpeedZeroOptimizer.complete_grad_norm_calculation_for_cpu_offload(optimizer, parameters)

    optimizer.update_offload_overflow_tracker = track_overflow
    optimizer.complete_grad_norm_calculation_for_cpu_offload = complete_norm


def gather_weights_on_save(engine) -> None:
    """Makes an engine at ZeRO stage 3 gather whole weights for `Trainer.save_model`; DeepSpeed's default is not to."""
    engine._config.zero_config.gather_16bit_weights_on_model_save = True


def save_engine(engine, folder: Path, save: Callable[[dict, str], None], exclude_frozen_parameters: bool) -> None:
    """Writes the engine's state (optimizer, scheduler, its copy of the model) under `folder`. Collective.

    Left out, because the main process alone writes them and could fail alone: the script `zero_to_fp32.py` and the
    file `latest`. The saved DeepSpeed configuration has its secrets removed, such as a monitor's API key. Without ZeRO
    the weights are left out too, because `Trainer.save_model` has written all of them: their names are there instead.

    Args:
        save: used instead of DeepSpeed's own writer; called with a state dict and the path of its file.
    """

    def save_without_secrets(state_dict: dict, path: str) -> None:
        replaced = {"ds_config": redact(state_dict["ds_config"])} if "ds_config" in state_dict else {}
        if engine.zero_optimization_stage() == 0 and not exclude_frozen_parameters:
            tied = engine.module.all_tied_weights_keys
            replaced["module"] = {name: tied.get(name, name) for name in state_dict["module"]}
        save(state_dict | replaced, path)

    engine.checkpoint_engine.save = save_without_secrets
    engine._copy_recovery_script = lambda *_: None
    engine.save_checkpoint(str(folder), save_latest=False, exclude_frozen_parameters=exclude_frozen_parameters)


def load_weights_of_safetensors() -> None:
    """Makes DeepSpeed find the weights that `save_engine` leaves out, in the safetensors files of the checkpoint."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    load = TorchCheckpointEngine.load

    def load_whole(self, path: str, *args, **kwargs) -> dict:
        state = load(self, path, *args, **kwargs)
        names = state.get("module")
        if names and all(isinstance(name, str) for name in names.values()):
            files = Path(path).parents[1].glob("model*.safetensors")
            weights = {name: weight for file in files for name, weight in load_file(file).items()}
            state["module"] = {name: weights[saved] for name, saved in names.items()}
        return state

    if load.__name__ != load_whole.__name__:
        TorchCheckpointEngine.load = load_whole


def restore_adam_beta_powers(optimizer) -> None:
    """Makes DeepSpeed's CPU Adam compute the powers of its betas as the uninterrupted run did, after a state is loaded.

    The powers are not in the state. After loading, Adam computes them as powers, whereas the uninterrupted run
    multiplied once per step, and the two round differently. One step on a single zero for each step taken
    (5 microseconds each) repeats the multiplications.
    """
    while hasattr(optimizer, "optimizer"):  # wrappers of accelerate and ZeRO
        optimizer = optimizer.optimizer
    if not hasattr(optimizer, "ds_opt_adam"):
        return
    num_steps = max((state["step"] for state in optimizer.state.values() if "step" in state), default=0)
    beta1, beta2 = optimizer.param_groups[0]["betas"]
    zeros = [torch.zeros(1) for _ in range(4)]
    for step in range(1, int(num_steps) + 1):
        optimizer.ds_opt_adam.adam_update(optimizer.opt_id, step, 0.0, beta1, beta2, 1e-8, 0.0, True, *zeros)


def num_elements(parameter: torch.nn.Parameter) -> int:
    """Elements of a whole parameter, of which ZeRO stage 3 leaves an empty tensor in each process."""
    return getattr(parameter, "ds_numel", parameter.numel())


def local_values(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The values of a parameter that this process holds: all or, at ZeRO stage 3, its share."""
    return getattr(parameter, "ds_tensor", parameter.detach())
