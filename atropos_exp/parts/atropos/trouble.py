"""The first error in a program's log: the last lines are often those of what gave up because of it."""

import re
from pathlib import Path

READ_BYTES = 1 << 20
_TRACEBACK = "Traceback (most recent call last)"
_ERROR = re.compile(r"\b(ERROR|CRITICAL)\b")
_LONGEST = 300


def first_error(log: Path) -> str | None:
    """The exception of the first traceback, or else the first line of level ERROR, if possible not of a retry."""
    try:
        with log.open("rb") as file:
            lines = file.read(READ_BYTES).decode(errors="replace").splitlines()
    except OSError:
        return None
    errors = [line.strip() for line in lines if _ERROR.search(line)]
    telling = [line for line in errors if "RetryError" not in line] or errors
    found = _exception(lines) or next(iter(telling), None)
    return None if found is None else found[:_LONGEST]


def _exception(lines: list[str]) -> str | None:
    """The line after the first traceback's indented ones."""
    start = next((at for at, line in enumerate(lines) if _TRACEBACK in line), None)
    if start is None:
        return None
    margin = len(lines[start]) - len(lines[start].lstrip())
    for line in lines[start + 1 :]:
        if line.strip() and len(line) - len(line.lstrip()) <= margin:
            return line.strip()
    return None
