"""`TrainArguments`: what it makes of flags."""

import pickle

import pytest
import torch
from conftest import ROOT, parse_train_args

from neoflix.arguments.training import TrainArguments
from neoflix.runtime.environment import prepare_environment
from neoflix.runtime.errors import UserError

pytestmark = pytest.mark.process  # DeepSpeed builds its operators


@pytest.fixture
def parse(tmp_path):
    prepare_environment()
    return lambda *words: parse_train_args(["--output_dir", str(tmp_path / "run"), "--use_cpu", "true", *words])


def test_no_argument_is_the_promised_run(parse):
    args = parse()
    assert args.model_name_or_path == "EleutherAI/gpt-neo-2.7B"
    assert (args.dataset, args.text_column, args.validation_fraction) == ("netflix", None, 0.1)
    assert args.deepspeed == str(ROOT / "ds_config.json")
    assert TrainArguments.output_dir == "results"
    assert not args.bf16
    assert not args.fp16


def test_nothing_is_evaluated_without_held_out_texts(parse):
    args = parse("--validation_fraction", "0")
    assert (args.eval_strategy, args.eval_on_start, args.metric_for_best_model) == ("no", False, None)


def test_properties_follow_the_flags(parse, tmp_path):
    args = parse("--lora", "true", "--lora_rank", "4", "--cache_dir", str(tmp_path), "--template", "{a}: {b}")
    assert args.lora_settings == {"rank": 4, "alpha": 8.0}
    assert args.model_options == {"allow_pickle": False, "lora": args.lora_settings}
    assert args.cache == tmp_path
    assert args.text_template.text_field == "b"
    assert args.weight_dtype == torch.float32
    assert args.texts_per_step == 64
    assert parse("--gradient_checkpointing", "true").activation_checkpointing is True


def test_a_combination_that_transformers_refuses_is_a_user_error(parse):
    with pytest.raises(UserError, match="logging_steps"):
        parse("--logging_steps", "1.5")


def test_arguments_can_be_pickled(parse):
    args = parse("--hub_token", "hf_0123456789abcdefghij")
    again = pickle.loads(pickle.dumps(args))
    assert again.seed == args.seed
    assert not hasattr(again, "hub_token") or again.hub_token != args.hub_token
