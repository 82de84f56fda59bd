"""Fine-tune GPT-Neo on short texts: `deepspeed train.py`, or by a recipe, `deepspeed train.py --config FILE`."""

from neoflix.tuning.answer import answer_without_training

if __name__ == "__main__":
    answer_without_training()  # --plan, --tune, --help and wrong flags: before the imports below, which take seconds

from transformers import set_seed

from neoflix.arguments.parse import read_all_flags
from neoflix.checkpoints.run_folder import open_run_folder
from neoflix.checkpoints.runs import describe_run
from neoflix.checkpoints.start import find_start
from neoflix.data.fields import FieldPool
from neoflix.data.sources import read_dataset
from neoflix.data.split import split_texts
from neoflix.data.tokens import count_tokens, fill_up, tokenize_split
from neoflix.model.load import find_tokenizer, load_model
from neoflix.model.vocabulary import get_window
from neoflix.planning.lengths import remember_counts
from neoflix.planning.plan_run import plan_run
from neoflix.reporting.write import finish_run
from neoflix.runtime.environment import prepare_environment
from neoflix.runtime.processes import main_process_first, run_and_exit, run_on_main_process
from neoflix.runtime.stop_requests import catch_stop_requests
from neoflix.sampling.architectures import check_can_be_sampled
from neoflix.training.agreement import check_same_everywhere
from neoflix.training.deepspeed import connect
from neoflix.training.evaluation import evaluate_only
from neoflix.training.trainer import TokenTrainer
from neoflix.upload import uploading


def main(argv: list[str] | None = None) -> None:
    prepare_environment()
    flags = read_all_flags(argv)
    if flags.eval_only:
        return evaluate_only(flags)
    plan = plan_run(flags, decide=run_on_main_process)  # UserError if the run does not fit
    if not flags.plan:
        with open_run_folder(flags.output_dir), uploading(flags):
            train(connect(flags), plan)


def train(args, plan) -> None:
    set_seed(args.seed)
    with main_process_first():  # it fills the caches that the others read
        texts = split_texts(read_dataset(args), args.validation_fraction)
        tokenizer = find_tokenizer(args.model_name_or_path, texts.train, args.cache, args.text_template)
    check_same_everywhere(args, texts)
    model = load_model(args.model_name_or_path, tokenizer, args.weight_dtype, args.generation, **args.model_options)
    check_can_be_sampled(model)
    with main_process_first():
        max_length = min(args.max_length or get_window(model), get_window(model))
        tokens = tokenize_split(texts, tokenizer, max_length, args.cache, args.loss_on_prompt)
    train_tokens, validation_tokens = tokens.train.dataset, tokens.validation.dataset
    run_on_main_process(remember_counts, args, max_length, count_tokens(train_tokens), len(validation_tokens))

    # Continue the run in this folder, but never another one.
    run = describe_run(args, model, tokenizer, *tokens)
    start = run_on_main_process(find_start, args.output_dir, args.resume_from_checkpoint, run, args.override_resumed)
    if start.is_finished:
        return
    trainer = TokenTrainer(
        model=model,
        args=args,
        train_dataset=fill_up(train_tokens, args.texts_per_step, tokenizer.bos_token_id),
        eval_dataset=fill_up(validation_tokens, args.eval_batch_size * args.world_size, tokenizer.bos_token_id),
        processing_class=tokenizer,
        field_pool=FieldPool.from_examples(texts.train) if args.text_template else None,
        plan=plan,
    )
    trainer.train(start=start)
    trainer.save_best()
    run_on_main_process(finish_run, args.output_dir, trainer.results())


if __name__ == "__main__":
    catch_stop_requests()
    run_and_exit(main)
