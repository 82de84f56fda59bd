"""What train.py answers before it imports torch, which takes seconds: --plan, --tune, --help and wrong flags."""

import os
import sys

from neoflix.arguments.reader import is_complete, read_train_flags
from neoflix.planning.plan_run import plan_run
from neoflix.runtime.console import say
from neoflix.runtime.early import answer_early, run_without_torch
from neoflix.runtime.errors import RUN_ME_AGAIN, StoppedEarly
from neoflix.tuning.trial_recipes import without_search
from neoflix.tuning.tuner import tune


def answer_without_training() -> None:
    """Answers, and exits. Returns if the program has to train, or if only transformers can check the flags."""
    answer_early(_answer_plan)
    if "RANK" not in os.environ:  # a search starts launchers; no launcher starts a search
        run_without_torch(_answer_tune)


def _answer_plan() -> None:
    flags = read_train_flags()
    if flags.plan and is_complete(flags):
        plan_run(flags)
        sys.exit()


def _answer_tune() -> None:
    flags, words = read_train_flags(), sys.argv[1:]
    if not flags.tune:
        return
    if not is_complete(flags):
        from neoflix.arguments.parse import read_all_flags  # imports transformers

        read_all_flags(without_search(words))
    try:
        tune(flags, words)
    except StoppedEarly as stopped:
        say(str(stopped))
        sys.exit(RUN_ME_AGAIN)
    sys.exit()
