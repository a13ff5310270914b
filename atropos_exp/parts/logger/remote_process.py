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


def record(
    log: Callable[[int, dict[str, Any]], object], table: Callable[..., Any], report: Report
) -> Mapping[str, Any] | None:
    """Give every message to the library until the run closes its logger: the run's summary; None if the run died.

    `log(step, values)` records the values of a step; `table(columns=..., data=...)` makes the library's own table of
    sample rollouts. An error of either is reported the first time; metrics.jsonl has everything in any case.
    """
    told = False
    for line in sys.stdin.buffer:
        try:
            message = json.loads(line)
        except ValueError:  # cut off by the death of the run
            return None
        try:
            if message["kind"] == "metrics":
                values = dict(message["values"])
                log(values.pop("step"), values)
            elif message["kind"] == "samples":
                rows = message["rows"]
                columns = list(rows[0]) if rows else ["prompt_id"]
                data = [[row[column] for column in columns] for row in rows]
                log(message["step"], {"samples": table(columns=columns, data=data)})
            elif message["kind"] == "finish":
                summary: Mapping[str, Any] = message["summary"]
                return summary
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
