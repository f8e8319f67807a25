"""Secrets out of everything that is written down: configs, tracking, messages.

Pure functions. A value is taken for a secret by the name it stands under, or because it is the user
information or a query secret inside a URL.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

REDACTED = "***"

# A word of a name that holds one of these names a secret.
_SECRET_PARTS = ("password", "passwd", "passphrase", "secret", "credential")
# So does a last word that ends in one of these: `hf_token`, not `tokens_per_second`; `api_key`, not `key_size`.
_SECRET_ENDINGS = ("token", "apikey", "accesskey", "privatekey")
_SECRET_LAST_WORDS = ("key", "auth", "pwd")
# `pad_token: <pad>` is vocabulary, `flops_per_token` a count.
_BEFORE_PLAIN_TOKENS = {"bos", "eos", "pad", "unk", "sep", "cls", "mask", "per"}

_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
# Up to the last @ before the path; a password with a slash in it (database URLs take one) needs its colon.
_URL_USER = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)(?:[^/?#\s'\"]*|[^/?#\s'\":@]*:[^\s'\"]*)@")
_URL_QUERY = re.compile(r"(?P<name>[?&][^=&\s]*(?:password|passwd|token|secret|key)[^=&\s]*=)[^&\s'\"]+", re.IGNORECASE)
_SOURCE_ASSIGNMENT = re.compile(r"(?P<before>(?P<name>[A-Za-z_][\w.-]*)['\"]?[ \t]*[:=][ \t]*)(?P<value>[^\s,;)]+)")
_SERVER = re.compile(r"ConnectionPool\(host='([^']*)', port=(\d+)\)")
_REASONS = [re.compile(text) for text in (r"Errno -?\d+\] ([\w ]+)", r"(timed out)", r"SSL: (\w+)", r"Caused by (\w+)")]
"""What requests says of a server that does not answer, in hundreds of characters; the first that is found is why."""
_ASSIGNMENT = re.compile(r"^(?P<name>[^=\s]+)=(?P<value>.*)$", re.DOTALL)


def is_secret_name(name: str) -> bool:
    """Whether a value under this name must not be shown: `api_key`, `hfToken`, `db.password`."""
    words = [word.lower() for word in _WORDS.findall(name)]
    if not words:
        return False
    if any(part in word for part in _SECRET_PARTS for word in words):
        return True
    if words[-1] == "token" and len(words) > 1 and words[-2] in _BEFORE_PLAIN_TOKENS:
        return False
    return words[-1] in _SECRET_LAST_WORDS or words[-1].endswith(_SECRET_ENDINGS)


def redact_text(text: str) -> str:
    """`text` with user information and secret query values in URLs replaced by `***`."""
    return _URL_QUERY.sub(rf"\g<name>{REDACTED}", _URL_USER.sub(rf"\g<scheme>{REDACTED}@", text))


def redact(value: Any) -> Any:
    """A copy of nested mappings and sequences without secrets; the input is left alone.

    Whatever stands under a secret name becomes `***` (None and booleans stay: they hold no secret), and
    every string loses the passwords in its URLs. Tuples become lists; other values come back as they are.
    """
    if isinstance(value, str):
        return redact_text(value)
    if isinstance(value, Mapping):
        return {
            name: REDACTED
            if is_secret_name(str(name)) and not (item is None or isinstance(item, bool))
            else redact(item)
            for name, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    return value


def redact_arguments(arguments: Sequence[str]) -> list[str]:
    """A command line without secrets: `api_key=…`, `--password=…` and `--password …` are covered."""
    result: list[str] = []
    hide_next = False
    for argument in arguments:
        assignment = _ASSIGNMENT.match(argument)
        if hide_next and not argument.startswith("-"):
            result.append(REDACTED)
        elif assignment and is_secret_name(assignment["name"]):
            result.append(f"{assignment['name']}={REDACTED}")
        else:
            result.append(redact_text(argument))
        hide_next = argument.startswith("-") and not assignment and is_secret_name(argument)
    return result


def redact_lines(text: str) -> str:
    """Source text without secrets: what is assigned to a secret name becomes `***`, URLs lose their passwords."""

    def hide(match: re.Match[str]) -> str:
        return match["before"] + REDACTED if is_secret_name(match["name"]) else match[0]

    return redact_text(_SOURCE_ASSIGNMENT.sub(hide, text))


def failure_message(error: BaseException) -> str:
    """An error in one line, without secrets."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if server := _SERVER.search(str(error)):
        why = next((found[1] for pattern in _REASONS if (found := pattern.search(str(error)))), "it says nothing")
        return f"no answer from {server[1]}:{server[2]}: {why}"
    return redact_text(str(error).strip().split("\n")[0][:300] or type(error).__name__)
