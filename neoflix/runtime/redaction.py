"""Removes secrets, such as a hub's token, from what a run records."""

import json
import re
import shlex

HIDDEN = "..."


SECRET_WORDS = ("token", "key", "secret", "password", "passwd", "passphrase", "credential", "credentials", "auth")


PATTERNS = (
    (re.compile(r"(\w[\w+.-]*://)[^\s/@'\"]+@"), rf"\1{HIDDEN}@"),  # https://user:password@host
    (re.compile(rf"(?i)([?&;][\w.-]*(?:{'|'.join(SECRET_WORDS)}|sig|signature)=)[^\s&;#'\"]+"), rf"\1{HIDDEN}"),
    (re.compile(r"\b(hf|api_org|gh[pousr]|github_pat|glpat|sk|xox[abp])([_-])[A-Za-z0-9_-]{16,}"), HIDDEN),
    (re.compile(r"\b(Bearer|Basic) +[A-Za-z0-9._~+/=-]{8,}"), rf"\1 {HIDDEN}"),
)


def is_secret(name: str) -> bool:
    """Whether the name of a flag or a key means a secret: hub_token, --hub-token, wandbApiKey, PASSWORD."""
    parts = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    return any(part.endswith(SECRET_WORDS) for part in re.split(r"[^a-z0-9]+", parts))


def redact(value):
    """A JSON value without secrets: neither the values of keys with secret names, nor secrets inside strings."""
    if isinstance(value, dict):
        return {key: _hide(item) if is_secret(str(key)) else redact(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    return redact_text(value) if isinstance(value, str) else value


def _hide(value):
    return HIDDEN if isinstance(value, str) and value else redact(value)


def redact_text(text: str) -> str:
    """A text without the secrets in it: in JSON, in URLs, and whatever looks like a token."""
    if text.lstrip().startswith(("{", "[")):
        try:
            return json.dumps(redact(json.loads(text)))
        except ValueError:
            pass
    for pattern, replacement in PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def redact_command(words: list[str]) -> str:
    """A command line as one types it, without secrets and without the launcher's `--local_rank`."""
    kept, hides_next = [], False
    for word in words:
        flag, equals, value = word.partition("=")
        is_flag = word.startswith("--")
        if flag in ("--local_rank", "--local-rank") and equals:
            continue
        if hides_next and not is_flag:
            kept.append(HIDDEN)
        elif is_flag and equals:
            kept.append(f"{flag}={HIDDEN if is_secret(flag) else redact_text(value)}")
        else:
            kept.append(redact_text(word))
        hides_next = is_flag and not equals and is_secret(flag)
    return shlex.join(kept)
