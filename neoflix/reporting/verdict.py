"""Did the training work? A verdict on a run, and remarks on it."""

from statistics import mean

from neoflix.reporting.history import Record

FEW_TEXTS = 1000

FEW_HELD_OUT = 100


def judge_run(record: Record) -> tuple[str, str]:
    """("yes", "no" or "unknown": did the training work?, one or two sentences)"""
    best, baseline = record.best, record.baseline
    if best is None:
        return "unknown", "The trained model was not evaluated on held-out texts."
    where = f"step {best['step']:,} (epoch {best['epoch']:.2f})"
    reached = (
        f"perplexity {best['eval_perplexity']:,.2f} at {where}, {best['eval_bits_per_char']:.3f} bits per character"
    )
    if baseline is None:
        return "unknown", f"Held-out texts: {reached}. The model was not evaluated before training."
    share = 1 - best["eval_perplexity"] / baseline["eval_perplexity"]
    from_to = f"Held-out texts: perplexity {baseline['eval_perplexity']:,.2f} before training, {reached}"
    if not record.improved:
        return "no", f"{from_to}. The model is no better than before training."
    return "yes", f"{from_to}: {share:.0%} lower. Lower is better."


def list_remarks(record: Record) -> list[str]:
    """What else a reader should know, one or two sentences each."""
    remarks = (_unfinished, _not_improved, _from_scratch, _overfits, _still_improves, _skipped_steps, _few_texts)
    return [sentence for remark in remarks if (sentence := remark(record))]


def _unfinished(record: Record) -> str | None:
    step, most = record.num_steps
    if not record.results:
        return f"The run is not finished: step {step:,} of {most:,}. The same command resumes it."
    if step < most and record.trained:
        return (
            f"The run stopped at step {step:,} of {most:,} because the held-out loss no longer fell "
            "(--early_stopping_patience)."
        )
    return None


def _not_improved(record: Record) -> str | None:
    if record.best is None or record.baseline is None or record.improved:
        return None
    return "Try a lower --learning_rate, check that the texts are the right ones, or train for longer."


def _from_scratch(record: Record) -> str | None:
    if record.run.get("model") != "demo":
        return None
    return (
        "This model started from random weights: it learns what the texts look like, but it writes no sentences. Those "
        "come with a pretrained model, such as --model_name_or_path smollm2."
    )


def _overfits(record: Record) -> str | None:
    """The held-out loss rises after the best step while the training loss still falls."""
    best, last = record.best, record.trained[-1] if record.trained else None
    if best is None or last["step"] <= best["step"] or last["eval_loss"] < best["eval_loss"] + 0.01:
        return None
    steps, losses = record.curve("loss")
    before = [loss for step, loss in zip(steps, losses, strict=True) if step <= best["step"]]
    after = [loss for step, loss in zip(steps, losses, strict=True) if step > best["step"]]
    if not before or not after or mean(after) >= mean(before[-len(after) :]):
        return None
    return (
        f"The model overfits after step {best['step']:,}: the held-out loss rose from {best['eval_loss']:.3f} to "
        f"{last['eval_loss']:.3f} while the training loss kept falling. The run saved the model from before that. More "
        "texts would help; more epochs would not."
    )


def _still_improves(record: Record) -> str | None:
    is_last = len(record.trained) > 1 and record.best == record.trained[-1]
    step, most = record.num_steps
    if not is_last or not record.results or step < most or (record.baseline and not record.improved):
        return None
    gain = record.trained[-2]["eval_loss"] - record.best["eval_loss"]
    if gain < 0.01:
        return None
    return "The model was still improving at the end: more epochs (--num_train_epochs) may help."


def _skipped_steps(record: Record) -> str | None:
    num_skipped, step = record.last("skipped_steps") or 0, record.num_steps[0]
    if num_skipped <= 0.05 * step:
        return None
    return f"{num_skipped:,} of {step:,} steps were skipped because fp16 gradients overflowed; bf16 does not overflow."


def _few_texts(record: Record) -> str | None:
    num_train, num_held_out = record.run.get("num_training_texts"), record.start.get("num_validation_texts")
    if num_held_out is not None and 0 < num_held_out < FEW_HELD_OUT:
        return f"Only {num_held_out:,} texts were held out, so small differences between their figures mean nothing."
    if num_train is not None and num_train < FEW_TEXTS:
        return f"There are only {num_train:,} training texts: expect the model to memorize some of them."
    return None
