"""Checks that a run, in its folder, would not touch the base model, another model, or a file of the user's."""

import json
import os
import re
from pathlib import Path

from neoflix.checkpoints.find import find_misplaced, list_numbered
from neoflix.checkpoints.manifest import find_corruption
from neoflix.checkpoints.names import MODEL_NAMES, RECORD_FILES
from neoflix.checkpoints.ownership import adopt, is_older_run, read_list
from neoflix.model.folder import ADAPTERS_CONFIG_FILE, PICKLED_WEIGHTS_FILES
from neoflix.runtime.errors import UserError


def check_output_dir(output_dir: str, model_name_or_path: str) -> None:
    """UserError where a run in this folder would touch what is not its own: the base model, another model, or a file
    of the user's. Writes nothing."""
    run = Path(output_dir)
    for base in _base_folders(model_name_or_path):
        _check_apart(run, base)
    if not run.is_dir():
        return
    owned = read_list(run)
    is_run = owned is not None or is_older_run(run)
    files = owned["files"] if owned else adopt(run)
    names = [name for name in MODEL_NAMES if name not in files]
    if not is_run:
        names += [*RECORD_FILES, *PICKLED_WEIGHTS_FILES]
    in_the_way = [name for name in names if os.path.lexists(run / name)]
    if not is_run:
        in_the_way += sorted(path.name for path in run.iterdir() if re.fullmatch(r"model-\d+-of-\d+\..*", path.name))
        in_the_way += [path.name for path in list_numbered(run) if find_corruption(path) or find_misplaced(path)]
    if in_the_way:
        others = f" (and {len(in_the_way) - 1} more)" if len(in_the_way) > 1 else ""
        raise UserError(
            f"--output_dir {output_dir}: {in_the_way[0]}{others} was not written by this run, which would replace "
            "it; choose another --output_dir, or move it away"
        )


def _base_folders(model_name_or_path: str) -> list[Path]:
    """The folders that a run reads its weights from: the model's and, for adapters, that of their base."""
    folders, name = [], model_name_or_path
    while Path(name).is_dir() and Path(name) not in folders:
        folders.append(Path(name))
        try:
            name = json.loads((folders[-1] / ADAPTERS_CONFIG_FILE).read_text(encoding="utf-8"))[
                "base_model_name_or_path"
            ]
        except (OSError, ValueError, KeyError, TypeError):
            break
        if not isinstance(name, str):
            break
    return folders


def _check_apart(run: Path, base: Path) -> None:
    run, base = Path(os.path.realpath(run)), Path(os.path.realpath(base))
    above_run = [path for path in (run, *run.parents) if path.exists()]
    above_base = [base, *base.parents]
    if run.exists() and os.path.samefile(run, base):
        relation = "is"
    elif any(os.path.samefile(path, base) for path in above_run):
        relation = "lies inside"
    elif run.exists() and any(os.path.samefile(path, run) for path in above_base):
        relation = "contains"
    else:
        return
    raise UserError(
        f"--output_dir {run}: {relation} the base model's folder {base}, which a run must not change; choose another "
        "--output_dir"
    )
