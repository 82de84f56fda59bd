"""The one place that touches DeepSpeed's private parts. Written for deepspeed 0.19.8: check it at each upgrade."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from neoflix.arguments.deepspeed_file import is_json, read_ds_config
from neoflix.arguments.training import TrainArguments
from neoflix.runtime.console import say
from neoflix.runtime.errors import UserError


def connect(flags) -> TrainArguments:
    """Prepares DeepSpeed for a run with these flags, and makes the arguments, which connects the run's processes."""
    disable_shm_collectives()
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
    """Compiles what DeepSpeed would compile on first use, where that has not been done: now, not after the model is
    loaded. One process of the machine at a time.

    A build that was killed leaves torch's lock behind, for which every later one waits for ever. Ours lasts as long
    as the process that holds it (flock): under it, a lock of torch's that no process has open is removed.
    """
    from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder
    from torch.utils.cpp_extension import _get_build_directory

    zero = config.get("zero_optimization", {})
    devices = {zero.get(part, {}).get("device") for part in ("offload_optimizer", "offload_param")}
    builders = [CPUAdamBuilder] if zero.get("offload_optimizer", {}).get("device") in ("cpu", "nvme") else []
    builders += [AsyncIOBuilder] if "nvme" in devices else []
    for builder in builders:
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
    """Has DeepSpeed start without its shared-memory collectives on a CPU. Before the processes connect.

    Training never calls them. But each process compiles them on first use, leaves 69 MB in /dev/shm when it ends
    (300 runs filled the host memory of one machine), and waits for ever for one on another node.
    """
    import deepspeed  # seconds to import: after every check that needs none of it

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def keep_gradient_norm(engine) -> None:
    """Makes a DeepSpeed engine keep the norm it clips gradients by without ZeRO (stage 0), where it forgets it."""
    from deepspeed.runtime.utils import clip_grad_norm_  # at import it asks what the accelerator is: too early

    def clip() -> None:
        weights, most = engine.module.parameters(), engine.gradient_clipping()
        engine._global_grad_norm = clip_grad_norm_(parameters=weights, max_norm=most, mpu=engine.mpu)

    engine.clip_fp32_gradients = clip
