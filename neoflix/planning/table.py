"""The plan as a table, and next to what was measured."""

from neoflix.planning.forecast import Plan
from neoflix.runtime.console import GIB


def plan_table(plan: Plan | None) -> str:
    """The plan as a table, in GiB."""
    if plan is None:
        return "plan: none, because the model's config.json is not on this machine yet"
    shape, texts, settings, machine = plan.shape, plan.texts, plan.settings, plan.machine
    precision = "half precision" if settings.weight_bytes == 2 else "fp32"
    trainable = f"{_count(settings.num_trainable(shape))} trainable (LoRA), " if settings.lora_rank else ""
    lines = [
        f"plan: {_count(shape.num_parameters)} parameters, {trainable}{precision}, {settings.ds_name} (ZeRO "
        f"{settings.stage}), {settings.num_processes} process(es)",
        f"texts: {texts.num_train:,} to train on, {texts.mean:.1f} tokens each ({texts.source}); batches of at most "
        f"{settings.batch_tokens:,} tokens{'' if shape.is_packed else ', padding included'}",
    ]
    if machine.has_gpu:
        free = machine.device_memory - machine.device_taken
        lines += _part_lines(f"device memory ({machine.device_name})", plan.device, plan.device_bytes, free)
    times = f" x {settings.local_processes}" if settings.local_processes > 1 else ""
    lines += _part_lines(f"host memory{times}", plan.host, plan.host_bytes, machine.host_memory)
    kept = f"{settings.num_checkpoints} checkpoints of {plan.checkpoint_bytes / GIB:.1f} GiB at the same time"
    there = "GiB" if machine.disk is None else f"of {machine.disk / GIB:.1f} GiB free"
    lines.append(f"disk {plan.run_bytes / GIB:.1f} {there}: {kept}")
    lines.append(
        f"{settings.num_steps:,} steps, {settings.train_tokens:,} tokens, {plan.flops:.2g} FLOP, {_time_words(plan)}"
    )
    return "\n".join(lines)


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.1f} million"


def _part_lines(title: str, parts: dict[str, int], total: int, free: int) -> list[str]:
    lines = [f"{title:44}{'GiB':>8}"]
    lines += [f"  {part:42}{size / GIB:8.2f}" for part, size in parts.items() if abs(size) >= 0.005 * GIB]
    return [*lines, f"  {'total':42}{total / GIB:8.2f}  of {free / GIB:.1f} free"]


def _time_words(plan: Plan) -> str:
    if (known := plan.seconds()) is None:
        return f"no time: the peak of {plan.machine.device_name} is not known"
    seconds, source = known
    amount = f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds / 60:.0f} min"
    return f"{amount} of training ({source})"


def compare(plan: Plan, device_bytes: int, host_bytes: int) -> tuple[str, dict[str, int]]:
    """The plan next to measured peaks: (a line to print, figures for all_results.json).

    Args:
        device_bytes: `torch.cuda.max_memory_allocated` of the fullest device, 0 without a GPU.
        host_bytes: of all processes together.
    """
    planned_host = plan.host_bytes // plan.settings.local_processes * plan.settings.num_processes
    figures, words = {"plan_host_bytes": planned_host}, []
    if plan.machine.has_gpu:
        figures["plan_device_bytes"] = plan.allocated_bytes
        words.append(f"device {plan.allocated_bytes / GIB:.1f} GiB, measured {device_bytes / GIB:.1f} GiB")
    words.append(f"host {planned_host / GIB:.1f} GiB, measured {host_bytes / GIB:.1f} GiB")
    return f"plan: {'; '.join(words)}", figures
