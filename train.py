"""Fine-tune GPT-Neo on short texts: `deepspeed train.py`, or by a recipe, `deepspeed train.py --config FILE`."""

from pathlib import Path

from neoflix import plan

if __name__ == "__main__":
    plan.answer_quickly()  # `--plan`: before the imports below, which take seconds

from transformers import set_seed

from neoflix import data, reading
from neoflix.config import parse_train_args
from neoflix.console import say
from neoflix.distributed import ask_main_process, main_process_first, run_and_exit
from neoflix.environment import prepare_environment
from neoflix.evaluation import evaluate_only
from neoflix.model import find_tokenizer, get_window, load_model
from neoflix.preemption import catch_stop_requests
from neoflix.report import close_run
from neoflix.run_folder import opened
from neoflix.runs import describe_run, find_start, save_results
from neoflix.trainer import TokenTrainer


def main(argv: list[str] | None = None) -> None:
    prepare_environment()
    if (args := parse_train_args(argv, must_fit=True)).eval_only:
        return evaluate_only(args)
    say(plan.plan_table(args.forecast))
    if not args.plan:
        with opened(args.output_dir):
            train(args)


def train(args) -> None:
    set_seed(args.seed)
    cache_dir = Path(args.cache_dir or reading.default_cache_dir())

    # Texts and tokenizer. The main process comes first and fills the caches that the others read.
    with main_process_first():
        texts = data.split_texts(reading.read_dataset(args), args.validation_fraction)
        tokenizer = find_tokenizer(args.model_name_or_path, texts.train, cache_dir, args.text_template)
    plan.check_same_everywhere(args, texts)

    # Model and tokens.
    options = {"allow_pickle": args.allow_pickle, "lora": args.lora_settings}
    model = load_model(args.model_name_or_path, tokenizer, args.weight_dtype, args.generation, **options)
    with main_process_first():
        max_length = min(args.max_length or get_window(model), get_window(model))
        sides = data.tokenize_split(texts, tokenizer, max_length, cache_dir, args.loss_on_prompt)
        train_tokens, validation_tokens = sides
    ask_main_process(plan.remember_counts, args, max_length, data.count_tokens(train_tokens), len(validation_tokens))

    # Continue the run in this folder, but never another one.
    run = describe_run(args, model, tokenizer, train_tokens, validation_tokens)
    start = ask_main_process(find_start, args.output_dir, args.resume_from_checkpoint, run, args.override_resumed)
    if start.is_finished:
        return
    trainer = TokenTrainer(
        model=model,
        args=args,
        train_dataset=data.fill_up(train_tokens, args.texts_per_step, tokenizer.bos_token_id),
        eval_dataset=data.fill_up(validation_tokens, args.eval_batch_size * args.world_size, tokenizer.bos_token_id),
        processing_class=tokenizer,
    )
    trainer.train(start=start)
    trainer.save_best()
    ask_main_process(save_results, args.output_dir, trainer.results())
    ask_main_process(close_run, args.output_dir)


if __name__ == "__main__":
    catch_stop_requests()
    run_and_exit(main)
