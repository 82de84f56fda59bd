"""Which model `launch.sh` trains on a machine without a GPU: `python -m neoflix.first_look` prints its name.

The best one within reach: GPT-Neo-125M if the hub has it for us, else SmolLM2-135M from a Python package, else the demo
model, which starts from random weights. Why the others were passed over goes to stderr.
"""

import sys

from neoflix.checkpoints.runs import find_run
from neoflix.model.packaged import SMOLLM2, find_packaged
from neoflix.model.source import check_reachable
from neoflix.runtime.errors import UserError

GPT_NEO = "EleutherAI/gpt-neo-125m"
DEMO = "demo"


def choose_model(output_dir: str) -> str:
    """The best model within reach, or the one that the run in `output_dir` has begun with."""
    begun = (find_run(output_dir) or {}).get("model")
    if begun in (GPT_NEO, SMOLLM2, DEMO):
        return begun
    for name, fetch in ((GPT_NEO, _fetch_config), (SMOLLM2, find_packaged)):
        try:
            fetch(name)
        except UserError as error:
            print(f"Passed over {name}: {str(error).split(': ', 1)[-1]}", file=sys.stderr)
        else:
            return name
    return DEMO


def _fetch_config(name: str) -> None:
    """Raises UserError if the hub cannot be reached, or has no such model."""
    from huggingface_hub import hf_hub_download

    check_reachable(name)
    try:
        hf_hub_download(name, "config.json")
    except OSError as error:
        raise UserError(f"{name}: the hub does not give it ({type(error).__name__})") from error


if __name__ == "__main__":
    sys.stdout, stdout = sys.stderr, sys.stdout  # a download's progress is not the answer
    print(choose_model(sys.argv[1]), file=stdout)
