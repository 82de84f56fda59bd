"""The fields that a prompt leaves out are drawn from the data set of the run that trained the model."""

from pathlib import Path

from neoflix.checkpoints.runs import find_run
from neoflix.data.fields import FieldPool
from neoflix.data.sources import find_local_dataset, read_examples
from neoflix.data.split import split_texts
from neoflix.data.template import Template
from neoflix.runtime.cache import default_cache_dir
from neoflix.runtime.errors import UserError


def read_field_pool(model_dir: Path | None, template: Template, missing: list[str]) -> FieldPool:
    """The fields of the texts that a run was trained on; no network is used.

    Args:
        model_dir: the run's folder or a checkpoint of it; its run.json names the data set.
        missing: the fields that a prompt leaves out, for the error.

    Raises:
        UserError: if the data set is not on this machine, or has changed so that it has no such fields.
    """
    recorded = ((model_dir and find_run(model_dir)) or {}).get("texts")
    try:
        if recorded is None:
            raise UserError("no run.json beside the model names that data set")
        path = find_local_dataset(recorded["dataset"], default_cache_dir())
        if path is None:
            raise UserError(f"{recorded['dataset']} is not on this machine")
        train = split_texts(read_examples(path, template=template), recorded["validation_fraction"]).train
    except UserError as error:
        raise UserError(
            f"--fields: give {', '.join(missing)} too; left-out fields are drawn from the data set that the model was "
            f"trained on, and {error}"
        ) from error
    return FieldPool.from_examples(train)
