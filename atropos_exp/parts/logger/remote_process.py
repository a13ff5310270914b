"""The half of a logger that runs in a process of its own, next to a tracking library that may hang or raise.

It reads messages from standard input and writes reports to standard output, a JSON object a line; whatever the library
prints goes to standard error, a log file of the run. `remote.py` is the other half. Standard library only.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from atropos_exp.processes import lifeline

Report = Callable[[str, str], None]  # (text, level): "info" goes to the console, "warning" to the log


def connect() -> tuple[dict[str, Any], Report] | None:
    """The first message, which holds the settings, and how to report; None if the run ended before it sent any."""
    lifeline.ignore()
    reports = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def report(text: str, level: str) -> None:
        try:
            print(json.dumps({"text": text, "level": level}), file=reports, flush=True)
        except OSError:  # the run is gone
            print(text, file=sys.stderr, flush=True)

    with open(0, "rb", buffering=0, closefd=False) as unbuffered:  # the rest of the input is left for `record`
        first = unbuffered.readline()
    return (json.loads(first), report) if first.endswith(b"\n") else None


class Seen:
    """The last step that the library was given, of each kind of message, in a file of the run: a run that was killed
    trains steps again, and the library keeps what it is given twice."""

    def __init__(self, path: str) -> None:
        self._path = path
        try:
            with open(path) as file:
                self._last: dict[str, int] = json.load(file)
        except (OSError, ValueError):
            self._last = {}

    def has(self, kind: str, step: int) -> bool:
        return step <= self._last.get(kind, -1)

    def note(self, kind: str, step: int) -> None:
        self._last[kind] = step
        with open(f"{self._path}.tmp", "w") as file:
            json.dump(self._last, file)
        os.replace(f"{self._path}.tmp", self._path)


def record(
    log: Callable[[int, dict[str, Any]], object], table: Callable[..., Any], report: Report, seen: Seen
) -> Mapping[str, Any] | None:
    """Give every message to the library until the run closes its logger: the run's summary; None if the run died.

    `log(step, values)` records the values of a step; `table(columns=..., data=...)` makes the library's own table of
    sample rollouts. An error of either is reported the first time; metrics.jsonl has everything in any case. What was
    `seen` before is left out.
    """
    told = False
    for line in sys.stdin.buffer:
        try:
            message = json.loads(line)
        except ValueError:  # cut off by the death of the run
            return None
        try:
            kind = message["kind"]
            if kind == "finish":
                summary: Mapping[str, Any] = message["summary"]
                return summary
            values = dict(message["values"]) if kind == "metrics" else {}
            step = values.pop("step") if kind == "metrics" else message["step"]
            if seen.has(kind, step):
                continue
            if kind == "samples":
                rows = message["rows"]
                columns = list(rows[0]) if rows else ["prompt_id"]
                data = [[row[column] for column in columns] for row in rows]
                values = {"samples": table(columns=columns, data=data)}
            log(step, values)
            seen.note(kind, step)
        except Exception as error:
            if not told:
                report(f"could not take a message (told once): {brief(error)}", "warning")
            told = True
    return None


def end_within(seconds: float, say: Callable[[], None] = lambda: None) -> None:
    """End this process after `seconds`, with `say()` before: a library may retry an upload for ever."""

    def end() -> None:
        time.sleep(seconds)
        say()
        os._exit(3)

    threading.Thread(target=end, daemon=True).start()


def brief(error: BaseException) -> str:
    """An error in one line, such as `CommError: the server does not answer`."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
