"""The flags of --push_to_hub, as far as they can be checked without a network. Imports no torch."""

from pathlib import Path

from neoflix.model.packaged import hub_name
from neoflix.runtime.errors import UserError


def repository_name(flags) -> str:
    """The repository that a run is uploaded to, OWNER/NAME, or NAME alone under the token's user."""
    return flags.hub_model_id or Path(flags.output_dir).absolute().name


def check_repository_name(flags) -> None:
    """Raises UserError if no repository of the hub can have the name."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id  # a fifth of a second

    name = repository_name(flags)
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        named = f"--hub_model_id {name}" if flags.hub_model_id else f"--push_to_hub true: the folder's name, {name!r}"
        raise UserError(
            f"{named}: must be OWNER/NAME or NAME, of letters, digits, '-', '_' and '.'; use --hub_model_id"
        ) from error


def check_base_is_public(model_name_or_path: str, named: str) -> None:
    """Raises UserError for adapters whose base model is a folder: nobody else could load them.

    Args:
        named: what the adapters belong to, which the error begins with.
    """
    if hub_name(model_name_or_path) is None:
        raise UserError(
            f"{named}: adapters name their base model, and {model_name_or_path} is not OWNER/NAME of the hub; use the "
            "base's name there, or upload a merged model (python -m neoflix.export --to merged)"
        )


def check_push(flags) -> None:
    """Raises UserError if --push_to_hub cannot work with these flags."""
    if not flags.push_to_hub:
        return
    if flags.eval_only:
        raise UserError("--push_to_hub true: --eval_only trains nothing to upload; leave one of them out")
    check_repository_name(flags)
    if flags.lora:
        check_base_is_public(flags.model_name_or_path, "--push_to_hub true with --lora true")
