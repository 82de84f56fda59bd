"""Uploads a run's best model to the Hugging Face hub: `--push_to_hub true`, or later `python -m neoflix.upload RUN`.

Nothing is uploaded while a run trains. At its end, once everything is on disk, the main process uploads in one commit
the files that load as the best model, and its card. Whether it may do that is checked before training.
"""

import argparse
import json
import os
import re
import shlex
import sys
from collections.abc import Iterator
from concurrent.futures import wait
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_session,
    get_token,
    is_offline_mode,
)
from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError  # the second is its HTTP client's
from huggingface_hub.utils import disable_progress_bars

from neoflix.arguments.command_line import SWITCH, Parser
from neoflix.arguments.hub_flags import check_base_is_public, check_repository_name, repository_name
from neoflix.checkpoints.names import RESULTS_FILE
from neoflix.checkpoints.ownership import adopt, read_list
from neoflix.checkpoints.runs import read_run
from neoflix.model.folder import ADAPTERS_CONFIG_FILE, ADAPTERS_FILE, WEIGHTS_FILES, has_weights, holds_adapters
from neoflix.model.packaged import hub_name
from neoflix.reporting.card import CARD_FILE, CARD_MARK, model_card
from neoflix.reporting.formats import format_size
from neoflix.reporting.history import Record
from neoflix.runtime.console import say
from neoflix.runtime.errors import StoppedEarly, UploadError, UserError
from neoflix.runtime.processes import run_and_exit, run_on_main_process
from neoflix.runtime.redaction import redact_text
from neoflix.runtime.stop_requests import find_stop_request, forget_stop_file

CHECK_TIMEOUT = 10  # seconds without an answer, before training
UPLOAD_TIMEOUT = 120  # seconds without a byte, after which huggingface_hub tries again, five times

PUSH = "--push_to_hub true"


def parse_upload_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line of `python -m neoflix.upload`."""
    parser = Parser(prog="python -m neoflix.upload", description="Upload a finished run to the Hugging Face hub.")
    add = parser.add_argument
    add("--hub_model_id", metavar="NAME", help="OWNER/NAME (default: the folder's name, under your user)")
    add("--hub_private_repo", **SWITCH, default=None, metavar="true|false", help="make a new repository private")
    add("--hub_token", metavar="WORD", help="a token that may write (HF_TOKEN or a login is safer)")
    add("output_dir", metavar="RUN", help="the folder of a finished run")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_upload_args(argv)
    check_repository_name(args)
    collect_files(Path(args.output_dir))  # UserError before anything is asked
    upload(args, check_upload(args))


@contextmanager
def uploading(flags: argparse.Namespace) -> Iterator[None]:
    """With --push_to_hub, checks before the block that the run can be uploaded, and uploads it after. Collective.

    Raises:
        UserError: before the block, if the hub cannot be reached, or the token may not write to the repository.
        UploadError: after it. The run is complete on disk.
        StoppedEarly: after it, if the upload was asked to stop.
    """
    if not flags.push_to_hub:
        yield
        return
    name = run_on_main_process(check_upload, flags)
    yield
    if reason := run_on_main_process(upload, flags, name):
        raise StoppedEarly(f"Stopped before the upload to {name} ended ({reason}); the same command uploads the run")


# Before training


def check_upload(flags: argparse.Namespace) -> str:
    """Checks that a run can be uploaded, and returns the repository as OWNER/NAME. Creates nothing. One process.

    Args:
        flags: output_dir, hub_model_id, hub_private_repo and hub_token.

    Raises:
        UserError: there is no valid token that may write there, or the hub does not answer.
    """
    if is_offline_mode():
        raise UserError(
            f"{PUSH}: HF_HUB_OFFLINE is set; unset it, or leave the flag out and upload the run later, where there is "
            "a network (python -m neoflix.upload RUN)"
        )
    try:
        with _giving_up_after(CHECK_TIMEOUT):
            api = HfApi(token=_find_token(flags.hub_token))
            account = _read_account(api, flags.hub_token)
            name = repository_name(flags)
            name = name if "/" in name else f"{account['name']}/{name}"
            _check_may_write(account, name)
            _check_repository(api, name, flags.hub_private_repo)
    except (HTTPError, OSError) as error:
        raise UserError(
            f"{PUSH}: {constants.ENDPOINT} cannot be asked for the repository ({_explain(error)}); try again later, or "
            "leave the flag out and upload the finished run with python -m neoflix.upload RUN"
        ) from error
    say(f"The model will be uploaded to {constants.ENDPOINT}/{name}")
    return name


@contextmanager
def _giving_up_after(seconds: float) -> Iterator[None]:
    """Limits how long huggingface_hub waits for an answer, or for the next byte; by default it waits forever."""
    session = get_session()
    before, session.timeout = session.timeout, seconds
    try:
        yield
    finally:
        session.timeout = before


def _find_token(given: str | None) -> str:
    token = given or get_token()
    if not token:
        raise UserError(f"{PUSH}: there is no token; run `hf auth login`, or set HF_TOKEN")
    return token


def _read_account(api: HfApi, given: str | None) -> dict:
    try:
        return api.whoami()
    except HfHubHTTPError as error:
        if error.response.status_code not in (401, 403):
            raise
        source = "--hub_token" if given else "HF_TOKEN" if os.environ.get("HF_TOKEN") else "the stored login"
        raise UserError(f"{PUSH}: {constants.ENDPOINT} does not accept the token of {source}; get a new one") from error


def _check_may_write(account: dict, name: str) -> None:
    """Raises UserError if the token cannot write, or the repository would belong to somebody else."""
    owner = name.partition("/")[0]
    writable = {account["name"]}
    writable |= {each["name"] for each in account.get("orgs", []) if each.get("roleInOrg") != "read"}
    if owner not in writable:
        raise UserError(
            f"{PUSH}: the token's user {account['name']} may not write to {owner}; use --hub_model_id with one of "
            f"{', '.join(sorted(writable))}"
        )
    token = account.get("auth", {}).get("accessToken", {})
    may_write = token.get("role") != "read"
    if "fineGrained" in token:
        scopes = token["fineGrained"].get("scoped", [])
        allowed = [each["permissions"] for each in scopes if each.get("entity", {}).get("name") in (owner, name)]
        may_write = any("repo.write" in permissions for permissions in allowed)
    if not may_write:
        raise UserError(f"{PUSH}: the token may not write to {name}; use a token with write access")


def _check_repository(api: HfApi, name: str, is_private: bool | None) -> None:
    """Raises UserError if the repository exists and cannot be written, or is public and should be private."""
    try:
        found = api.model_info(name)
    except RepositoryNotFoundError:
        return
    try:
        api.auth_check(name, write=True)
    except HfHubHTTPError as error:
        if error.response.status_code not in (401, 403, 404):
            raise
        raise UserError(f"{PUSH}: the token may not write to {name}; use another token, or --hub_model_id") from error
    if is_private and not found.private:
        raise UserError(
            f"--hub_private_repo true: {name} exists and is public; make it private on the hub, or use another "
            "--hub_model_id"
        )


# After training


def collect_files(run: Path) -> dict[str, Path | bytes]:
    """The files that load as a finished run's best model, by name: those that the run wrote at the top of its folder.
    Checkpoints, logs and texts are not among them.

    Raises:
        UserError: the folder holds no finished run, or adapters that nobody else could load.
    """
    if read_run(run) is None or not (run / RESULTS_FILE).is_file() or not has_weights(run):
        raise UserError(f"{run}: holds no finished run; name the --output_dir of a run that has ended")
    owned = read_list(run)
    names = owned["files"] if owned else adopt(run)
    files = {name: run / name for name in sorted(names) if (run / name).is_file()}
    if holds_adapters(run):
        config = json.loads((run / ADAPTERS_CONFIG_FILE).read_text(encoding="utf-8"))
        base = config["base_model_name_or_path"]
        check_base_is_public(base, str(run))
        config["base_model_name_or_path"] = hub_name(base)  # another one for smollm2
        files[ADAPTERS_CONFIG_FILE] = json.dumps(config, indent=2).encode()
    return files


def make_card(run: Path, name: str) -> Path | bytes:
    """The card to upload: with the repository's name, unless the user has written README.md."""
    file = run / CARD_FILE
    if file.is_file() and CARD_MARK not in file.read_text(encoding="utf-8", errors="replace"):
        return file
    return model_card(Record.read(run), repository=name).encode()


def upload(flags: argparse.Namespace, name: str) -> str | None:
    """Uploads a finished run in one commit, and returns None, or the reason why it was asked to stop. One process.

    Args:
        flags: output_dir, hub_private_repo, hub_token and, of train.py, disable_tqdm.

    Raises:
        UploadError: whatever the cause. The run's folder is as before.
    """
    run = Path(flags.output_dir)
    files = {**collect_files(run), CARD_FILE: make_card(run, name)}
    size = sum(len(file) if isinstance(file, bytes) else file.stat().st_size for file in files.values())
    say(f"Uploading {len(files)} files, {format_size(size)}, to {constants.ENDPOINT}/{name}")
    if not sys.stderr.isatty() or getattr(flags, "disable_tqdm", False):
        disable_progress_bars()  # they would fill a log file
    later = f"python -m neoflix.upload {shlex.quote(str(run))} --hub_model_id {name}"
    later += " --hub_private_repo true" * bool(flags.hub_private_repo)
    try:
        with _giving_up_after(UPLOAD_TIMEOUT):
            api = HfApi(token=flags.hub_token or get_token())
            future = api.run_as_future(_commit, api, name, files, flags.hub_private_repo)
            while wait([future], timeout=1).not_done:  # a stop request must not wait for the network
                if reason := find_stop_request(str(run)):
                    forget_stop_file(str(run))
                    return reason
            say(f"Uploaded: {future.result()}")
    except KeyboardInterrupt:
        say(f"Stopped before the upload ended. The run is complete in {run}; to upload it: {later}")
        raise
    except Exception as error:
        raise UploadError(
            f"the run is complete in {run}, but it could not be uploaded to {name} ({_explain(error)}); to try again: "
            f"{later}"
        ) from error
    return None


def _commit(api: HfApi, name: str, files: dict[str, Path | bytes], is_private: bool | None) -> str:
    """Makes the repository if it is missing, and one commit in it. Weights of an earlier upload that are not replaced
    are deleted, because they would be loaded too; a card that somebody has edited on the hub is kept."""
    api.create_repo(name, private=is_private, exist_ok=True)
    present = api.list_repo_files(name)
    if CARD_FILE in present:
        card = Path(api.hf_hub_download(name, CARD_FILE)).read_text(encoding="utf-8")
        if CARD_MARK not in card:
            say(f"{CARD_FILE} of {name} was not written by neoflix and is kept")
            files = {name: file for name, file in files.items() if name != CARD_FILE}
    operations = [CommitOperationAdd(file, content) for file, content in files.items()]
    stale = [file for file in present if _is_weights(file) and file not in files]
    operations += [CommitOperationDelete(file) for file in stale]
    return api.create_commit(name, operations, commit_message="Upload the model").commit_url


def _is_weights(name: str) -> bool:
    known = (*WEIGHTS_FILES, ADAPTERS_FILE, ADAPTERS_CONFIG_FILE)
    return name in known or re.fullmatch(r"model-\d+-of-\d+\.safetensors", name) is not None


def _explain(error: Exception) -> str:
    """What went wrong, in one line and without secrets. huggingface_hub wraps the errors of its threads."""
    while isinstance(error, RuntimeError) and error.__cause__:
        error = error.__cause__
    status = getattr(getattr(error, "response", None), "status_code", None)
    words = getattr(error, "server_message", None) or str(error) or type(error).__name__
    line = redact_text(words.strip().splitlines()[0])
    return f"HTTP {status}: {line}" if status else line


if __name__ == "__main__":
    run_and_exit(main)
