"""Keeps secrets out of what leaves the machine or the process: config.yaml, W&B, logs.

By the name of a key, by the value (whatever a secret-looking environment variable holds, and the forms of well-known
tokens), and from URLs that carry a password.
"""

import os
import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

REDACTED = "<redacted>"

_SECRET_WORDS = {"password", "passwd", "passphrase", "secret", "secrets", "credential", "credentials", "apikey",
                 "authorization", "bearer", "netrc"}  # fmt: skip
_SECRET_KEYS = {("api", "key"), ("access", "key"), ("private", "key"), ("secret", "key"), ("ssh", "key"),
                ("signing", "key"), ("auth", "header")}  # fmt: skip
_VOCABULARY = {"pad", "eos", "bos", "unk", "stop", "mask", "sep", "cls", "special", "start", "end", "image", "first",
               "last", "per", "next"}  # fmt: skip
_FORMS = re.compile(
    r"hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|sk-[\w-]{20,}|wandb_v\d_\w{20,}"
    r"|AKIA[0-9A-Z]{16}|xox[abpr]-[\w-]{10,}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{5,}"
)
_USERINFO = re.compile(r"(?<=://)[^/\s@:]+(?::[^/\s@]*)?@")
_ASSIGNMENT = re.compile(r"(([\w.-]+)=)[^\s'\"]+")  # an override on a command line
_SHORTEST_VALUE = 8  # a shorter one would blot out ordinary words


def redact(value: Any) -> Any:
    """Return a copy of a tree of mappings, lists and scalars in which secrets read `<redacted>`.

    redact({"api_key": "abc", "max_tokens": 5})  # {"api_key": "<redacted>", "max_tokens": 5}
    """
    known = {text for name, text in os.environ.items() if is_secret_name(name) and len(text) >= _SHORTEST_VALUE}
    return _redact(value, sorted(known, key=len, reverse=True))


def is_secret_name(name: str) -> bool:
    """Whether a key or variable of this name holds a secret: `api_key` and `hfToken` do, `max_tokens` does not."""
    words = re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])", name)
    lower = [word.lower() for word in words]
    if _SECRET_WORDS & set(lower) or _SECRET_KEYS & set(pairwise(lower)):
        return True
    return bool(lower) and lower[-1] == "token" and not _VOCABULARY & set(lower[:-1])


def _redact(value: Any, known: list[str]) -> Any:
    if isinstance(value, Mapping):
        return {
            key: REDACTED if item not in (None, "") and not isinstance(item, bool) and is_secret_name(str(key))
            else _redact(item, known)
            for key, item in value.items()
        }  # fmt: skip
    if isinstance(value, (list, tuple)):
        return [_redact(item, known) for item in value]
    if isinstance(value, str):
        for secret in known:
            value = value.replace(secret, REDACTED)
        value = _USERINFO.sub(f"{REDACTED}@", _FORMS.sub(REDACTED, value))
        return _ASSIGNMENT.sub(lambda m: m[1] + REDACTED if is_secret_name(m[2]) else m[0], value)
    return value
