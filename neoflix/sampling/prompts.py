"""The prompts that `generate.py`'s arguments name."""

import os
from pathlib import Path

from neoflix.data.encodings import read_lines
from neoflix.data.fields import read_fields
from neoflix.data.template import find_template
from neoflix.data.tokenizer import read_tokenizer
from neoflix.runtime.errors import UserError


def read_prompts(args, model_dir: Path) -> list[str] | list[dict]:
    """The prompts, in words or as fields of the model's template.

    With `--fields` or `--fields_file`, and by default for a model with a template: fields, one dict per prompt.
    Otherwise `--prompt` itself or, if it is a file, its lines without the blank ones.

    Raises:
        UserError: if a file cannot be read or has no text, or if the model has no such fields.
    """
    prompt, template = args.prompt, find_template(read_tokenizer(model_dir, f"--model_dir {args.model_dir}"))
    if args.fields or args.fields_file or (template and not prompt):
        return read_fields(args.fields, args.fields_file, template)
    if not os.path.isfile(prompt):
        return [prompt]
    try:
        prompts = read_lines(Path(prompt))
    except (OSError, UserError) as error:
        raise UserError(f"--prompt {prompt}: cannot be read ({error})") from error
    if not prompts:
        raise UserError(f"--prompt {prompt}: the file has no line with text")
    return prompts
