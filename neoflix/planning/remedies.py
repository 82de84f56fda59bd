"""What to change in a run that does not fit: the smallest changes that help."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from neoflix.arguments.deepspeed_file import read_ds_config
from neoflix.arguments.train_flags import TrainFlags
from neoflix.model.shape import HUB_SHAPES, gpt_neo_shape
from neoflix.planning.forecast import Plan, forecast
from neoflix.planning.presets import find_presets, missing_swap_folder, with_small_card
from neoflix.planning.table import plan_table
from neoflix.runtime.console import GIB
from neoflix.runtime.files import ROOT
from neoflix.runtime.gpus import PINNED_MEMORY

SPARE = GIB  # of the device, for what a plan cannot know: recomputing a few layers more costs little


def explain(plan: Plan) -> str:
    """For a plan that does not fit: its table, what is too large, and the three smallest changes that make it fit."""
    lines = ["this run does not fit", plan_table(plan)]
    for name, needed, available, largest in plan.over_budget():
        lines.append(f"too large: {needed / GIB:.1f} GiB of {name}, {available / GIB:.1f} GiB available; {largest}")
    lines += _machine_remedies(plan)
    changes = smallest_changes(plan)
    lines += [f"  {flags}: {_describe(changed, plan)}" for flags, changed in changes]
    if not changes:
        lines.append("no single setting makes this run fit; use a smaller model or a larger machine")
    return "\n".join(lines)


def _machine_remedies(plan: Plan) -> list[str]:
    """What the machine itself could give: memory that other programs hold, or that Windows keeps."""
    machine, lines = plan.machine, []
    short_of = {name for name, *_ in plan.over_budget()}
    if "device memory" in short_of and plan.device_bytes <= machine.device_memory:
        number = "" if machine.device_index is None else f" (number {machine.device_index})"
        lines.append(
            f"other programs hold {machine.device_taken / GIB:.1f} GiB of {machine.device_name}{number}; end them "
            "(nvidia-smi lists them), or name other GPUs in CUDA_VISIBLE_DEVICES"
        )
    if "host memory" in short_of and machine.is_wsl:
        lines.append("WSL2 has a part of Windows' memory: raise `memory=` in %UserProfile%\\.wslconfig, wsl --shutdown")
    return lines


def explain_failure(plan: Plan | None, error: str, allocated: int, reserved: int, host: int) -> str:
    """For a run that ran out of memory: the plan's table, the measured peaks, and the smallest changes.

    Args:
        allocated, reserved: peaks of torch's allocator on the device in bytes; 0 without a GPU.
        host: peak of this process in host memory in bytes.
    """
    device = f"torch allocated {allocated / GIB:.1f} GiB at the peak and reserved {reserved / GIB:.1f} GiB; "
    lines = [f"out of memory: {error.splitlines()[0]}"]
    lines += [f"{device if reserved else ''}this process used {host / GIB:.1f} GiB of host memory"]
    changes = smaller_runs(plan) if plan else []
    if plan:
        lines += [plan_table(plan)]
    lines += ["these changes need less:"] if changes else ["a smaller --per_device_train_batch_size needs less"]
    return "\n".join([*lines, *(f"  {flags}: {_describe(changed, plan)}" for flags, changed in changes)])


def _describe(changed: Plan, before: Plan) -> str:
    device = f"device {changed.device_bytes / GIB:.1f} GiB, " if changed.machine.has_gpu else ""
    is_adapted = changed.settings.lora_rank > before.settings.lora_rank
    note = "; trains adapters only (docs/lora.md)" if is_adapted else ""
    return f"{device}host {changed.host_bytes / GIB:.1f} GiB, disk {changed.run_bytes / GIB:.1f} GiB{note}"


def smallest_changes(plan: Plan, most: int = 3) -> list[tuple[str, Plan]]:
    """The first single changes that make the run fit, the smallest first: (flags, the changed plan)."""
    fitting = ((flags, changed) for flags, changed in _changes(plan) if changed.fits)
    return [change for _, change in zip(range(most), fitting, strict=False)]


def smaller_runs(plan: Plan, most: int = 3) -> list[tuple[str, Plan]]:
    """The first changes that need at least a tenth less of the device or the host than planned, for a run that failed
    although its plan fits."""
    tight = replace(plan.machine, host_memory=int(0.9 * plan.host_bytes))
    if plan.machine.has_gpu:
        taken = plan.machine.device_memory - int(0.9 * plan.device_bytes)
        tight = replace(plan.machine, device_taken=max(plan.machine.device_taken, taken))
    return smallest_changes(replace(plan, machine=tight), most)


def _changes(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """Single changes: those of memory and speed first, then LoRA, then smaller models."""
    for kind in (_batch_changes, _recomputing, _disk_changes, _host_changes, _preset_changes, _lora, _smaller_models):
        yield from kind(plan)


def _with(plan: Plan, **changes) -> Plan:
    return forecast(plan.shape, plan.texts, replace(plan.settings, **changes), plan.machine)


def _batch_changes(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """Smaller batches, and more of them in each step. The largest that fits, or the smallest."""
    texts, divisor = plan.settings.batch_texts, 2
    while (texts or plan.settings.budget // max(plan.texts.longest, 1)) // divisor >= 1:
        smaller = _smaller_batch(plan, divisor)
        flag = "per_device_train_batch_size" if texts else "tokens_per_device_batch"
        count = smaller["batch_texts"] if texts else smaller["budget"]
        flags = f"--{flag} {count} --gradient_accumulation_steps {smaller['accumulation']}"
        changed = _with(plan, **smaller, eval_tokens=min(plan.settings.eval_tokens, smaller["batch_tokens"]))
        if changed.fits or texts == divisor:
            yield flags, changed
            return
        divisor *= 2


def _smaller_batch(plan: Plan, divisor: int) -> dict:
    """Settings of batches that have a fraction of the texts or tokens, and of steps with as many of them as before."""
    settings, texts, is_packed = plan.settings, plan.texts, plan.shape.is_packed
    smaller = {"accumulation": settings.accumulation * divisor}
    if settings.batch_texts is None:
        budget = settings.budget // divisor
        tokens, padding = texts.of_budget(budget, is_packed), texts.padding(None, budget, is_packed)
        return smaller | {"budget": budget, "batch_tokens": tokens, "padding": padding}
    count = settings.batch_texts // divisor
    tokens, padding = texts.of_batch(count, is_packed), texts.padding(count, None, is_packed)
    return smaller | {"batch_texts": count, "batch_tokens": tokens, "padding": padding}


def _recomputing(plan: Plan) -> Iterator[tuple[str, Plan]]:
    if plan.settings.recomputed_layers == plan.shape.num_layers:
        return
    fewest = fewest_layers(lambda layers: _with(plan, recomputed_layers=layers), plan.shape.num_layers)
    layers = "true" if fewest in (None, plan.shape.num_layers) else max(fewest, 2)
    count = plan.shape.num_layers if layers == "true" else layers
    yield f"--activation_checkpointing {layers}", _with(plan, recomputed_layers=count)


def fewest_layers(planned: Callable[[int], Plan], num_layers: int) -> int | None:
    """The fewest layers to recompute with which a run leaves SPARE of the device free, or else half of it, or else with
    which it fits; None if it does not fit with all of them.

    Args:
        planned: the plan with this many recomputed layers.
    """
    plans = [planned(layers) for layers in range(num_layers + 1)]
    for spare in (SPARE, SPARE // 2, 0):
        fitting = [not plan.over_budget(spare) for plan in plans]
        if any(fitting):
            return fitting.index(True)
    return None


def _disk_changes(plan: Plan) -> Iterator[tuple[str, Plan]]:
    if plan.settings.num_checkpoints > 2:
        yield "--save_total_limit 1", _with(plan, num_checkpoints=2)
    if plan.settings.num_checkpoints:
        yield "--save_strategy no", _with(plan, num_checkpoints=0)


def _host_changes(plan: Plan) -> Iterator[tuple[str, Plan]]:
    if plan.settings.rounds_pinned and plan.pinned_bytes:
        yield f"PYTORCH_ALLOC_CONF={PINNED_MEMORY}", _with(plan, rounds_pinned=False)


def _preset_changes(plan: Plan) -> Iterator[tuple[str, Plan]]:
    settings = plan.settings
    presets = find_presets(plan.machine, settings.num_processes, settings.is_fp16)
    for name in with_small_card(presets, settings.num_processes, settings.accumulation):
        config = read_ds_config(ROOT / name)
        if Path(name).name == settings.ds_name or missing_swap_folder(config):
            continue
        changed = _with(plan, ds_config=config, ds_name=Path(name).name)
        yield f"--deepspeed {name}", changed
        if not settings.recomputed_layers:
            yield from ((f"--deepspeed {name} {flag}", both) for flag, both in _recomputing(changed))


def _lora(plan: Plan) -> Iterator[tuple[str, Plan]]:
    if not plan.settings.lora_rank:
        yield "--lora true", _with(plan, lora_rank=TrainFlags.lora_rank)


def _smaller_models(plan: Plan) -> Iterator[tuple[str, Plan]]:
    for name, known in reversed(HUB_SHAPES.items()):
        smaller = gpt_neo_shape(known)
        if smaller.num_parameters < plan.shape.num_parameters * 0.9:
            yield f"--model_name_or_path {name}", forecast(smaller, plan.texts, plan.settings, plan.machine)
