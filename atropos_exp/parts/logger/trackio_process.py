"""The process that writes trackio's data base: reads JSON lines from standard input, writes reports to standard output.

A script, started by `trackio.py`; imports nothing of this package. Ends by itself when its input ends.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from typing import Any


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # a cluster signals every process of a job; the run decides what ends
    reports = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever trackio prints goes to the log file

    def report(text: str, level: str = "info") -> None:
        try:
            print(json.dumps({"text": text, "level": level}), file=reports, flush=True)
        except OSError:  # the run is gone
            print(text, file=sys.stderr, flush=True)

    first = sys.stdin.buffer.readline()
    if not first.endswith(b"\n"):
        return
    settings: dict[str, Any] = json.loads(first)
    os.environ["TRACKIO_DIR"] = settings["folder"]  # read at import
    os.environ["HF_HUB_OFFLINE"] = "1"  # local only: nothing is uploaded anywhere
    for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        os.environ.pop(name, None)
    try:
        import trackio

        trackio.init(
            project=settings["project"], name=settings["name"], group=settings["group"], config=settings["config"],
            resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False,
        )  # fmt: skip
    except Exception as error:  # the run goes on without it
        report(f"does not start, the run goes on without it: {type(error).__name__}: {error}", "warning")
        return
    report(f"to see the curves: {settings['show']}")
    _record(trackio, report)
    threading.Thread(target=_end_within, args=(settings["finish_timeout"],), daemon=True).start()
    trackio.finish()


def _record(trackio: Any, report: Any) -> None:
    told = False
    for line in sys.stdin.buffer:
        try:
            message = json.loads(line)
        except ValueError:  # cut off by the death of the run
            return
        try:
            if message["kind"] == "metrics":
                values = dict(message["values"])
                trackio.log(values, step=values.pop("step"))
            elif message["kind"] == "samples":
                trackio.log({"samples": _table(trackio, message["rows"])}, step=message["step"])
            elif message["kind"] == "finish":
                return
        except Exception as error:  # told once; metrics.jsonl has it in any case
            if not told:
                report(f"could not take a message (told once): {type(error).__name__}: {error}", "warning")
            told = True


def _table(trackio: Any, rows: list[dict[str, Any]]) -> Any:
    columns = list(rows[0]) if rows else ["prompt_id"]
    return trackio.Table(columns=columns, data=[[row[column] for column in columns] for row in rows])


def _end_within(seconds: float) -> None:
    time.sleep(seconds)
    os._exit(3)


if __name__ == "__main__":
    main()
