"""The process that talks to W&B: reads JSON lines from standard input, writes reports to standard output.

A script, started by `wandb.py`; imports nothing of this package. It forks a session per attempt (online, then offline),
for a wandb that failed to connect cannot be started again in one process. Ends by itself when its input ends (the run
was closed, or died), at the latest `finish_timeout` seconds later.
"""

from __future__ import annotations

import glob
import json
import netrc
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlparse

DEFAULT_HOST = "https://api.wandb.ai"
_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")  # where a key of `wandb login` may be filed under
_NOT_STARTED = 10  # exit code of a session that has read no message yet

Settings = dict[str, Any]
Report = Callable[[str, str], None]  # (text, level)


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # a cluster signals every process of a job; the run decides what ends
    reports = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever wandb prints goes to the log file

    def report(text: str, level: str = "info") -> None:
        try:
            print(json.dumps({"text": text, "level": level}), file=reports, flush=True)
        except OSError:  # the run is gone
            print(text, file=sys.stderr, flush=True)

    with open(0, "rb", buffering=0, closefd=False) as unbuffered:  # the rest of the input is the session's
        first = unbuffered.readline()
    if not first.endswith(b"\n"):
        return
    settings: Settings = json.loads(first)
    mode = settings["mode"]
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline")
    if _attempt(settings, mode, report) == _NOT_STARTED and mode != "offline":
        _attempt(settings, "offline", report)


def _attempt(settings: Settings, mode: str, report: Report) -> int:
    """Run one session in a child; return its exit code. If the run dies and the session hangs, end it."""
    run = os.getppid()
    session = os.fork()
    if session == 0:
        try:
            code = _session(settings, mode, report)
        except BaseException as error:
            report(f"ended: {_brief(error)}", "warning")
            code = 1
        sys.stderr.flush()
        os._exit(code)  # wandb's own exit would wait for connections that failed before
    deadline = float("inf")
    while True:
        ended, status = os.waitpid(session, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if os.getppid() != run:
            deadline = min(deadline, time.monotonic() + settings["finish_timeout"] + 5.0)
        if time.monotonic() > deadline:
            os.kill(session, signal.SIGKILL)
        time.sleep(0.1)


def _session(settings: Settings, mode: str, report: Report) -> int:
    import wandb

    try:
        run = _init(wandb, settings, mode)
    except Exception as error:
        then = "the run goes on without it" if mode == "offline" else "recording offline"
        report(f"no connection, {then}: {_brief(error)}", "warning")
        return _NOT_STARTED
    # a resumed run may log a step again; with an axis of its own the later point wins, whatever W&B's counter says
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    where = f"at {run.url}" if mode == "online" else f"offline; to upload: wandb sync {run.settings.sync_dir}"
    report(f"recording {where}", "info")
    summary: dict[str, Any] = {"status": "killed"}  # unless the run lives to say something else
    told = False
    for message in _messages():
        try:
            if message["kind"] == "metrics":
                run.log(message["values"])
            elif message["kind"] == "samples":
                run.log({"samples": _table(message["rows"]), "step": message["step"]})
            elif message["kind"] == "finish":
                summary = message["summary"]
                break
        except Exception as error:
            if not told:
                report(f"could not take a message (told once): {_brief(error)}", "warning")
            told = True
    sync_dir = run.settings.sync_dir
    again = f"wandb sync {'--include-online ' if mode == 'online' else ''}{shlex.quote(sync_dir)}"
    _end_within(
        settings["finish_timeout"],
        lambda: report(f"the upload did not end in time; for the rest: {again}", "warning"),
    )
    for key, value in summary.items():
        run.summary[f"run/{key}"] = value
    run.finish(exit_code=0 if summary.get("status") in ("finished", "stopped") else 1)
    if mode == "offline":
        report(f"recorded offline; to upload: wandb sync {_all_attempts(sync_dir)}", "info")
    return 0


def _init(wandb: Any, settings: Settings, mode: str) -> Any:
    return wandb.init(
        mode=mode,
        dir=settings["folder"],
        id=settings["id"],
        resume="allow",
        name=settings["name"],
        project=settings["project"],
        entity=settings["entity"],
        group=settings["group"],
        job_type=settings["job_type"],
        tags=settings["tags"],
        config=settings["config"],
        settings=wandb.Settings(
            init_timeout=settings["init_timeout"],
            console="off",
            silent=True,
            disable_git=True,
            disable_code=True,
            x_disable_stats=True,
            x_disable_meta=True,
            x_save_requirements=False,
            x_transaction_log_flush_interval=1.0,  # a killed run keeps all but its last second
        ),
    )


def _all_attempts(sync_dir: str) -> str:
    """What `wandb sync` wants: every folder of this run that was recorded offline, in order. A requeued run has one
    for each attempt, and all of them are parts of one run."""
    run_id = sync_dir.rpartition("-")[2]
    return shlex.join(sorted(glob.glob(f"{glob.escape(os.path.dirname(sync_dir))}/offline-run-*-{run_id}")))


def has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "")).hostname
    for path in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        try:
            known = netrc.netrc(os.path.expanduser(path)).hosts if path else {}
        except (OSError, netrc.NetrcParseError):
            continue
        if any(name in known for name in ((host,) if host else _HOSTS)):
            return True
    return False


def _table(rows: list[dict[str, Any]]) -> Any:
    import wandb

    columns = list(rows[0]) if rows else ["prompt_id"]
    return wandb.Table(columns=columns, data=[[row[column] for column in columns] for row in rows])


def _messages() -> Iterator[dict[str, Any]]:
    for line in sys.stdin.buffer:
        try:
            message = json.loads(line)
        except ValueError:  # cut off by the death of the run
            return
        yield message


def _end_within(seconds: float, say: Callable[[], None]) -> None:
    """W&B may retry an upload for ever; this process does not."""

    def end() -> None:
        time.sleep(seconds)
        say()
        os._exit(3)

    threading.Thread(target=end, daemon=True).start()


def _brief(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


if __name__ == "__main__":
    main()
