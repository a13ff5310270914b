"""The process that talks to W&B; `wandb.py` starts it.

It forks a session per attempt (online, then offline), for a wandb that failed to connect cannot be started again in
one process. It ends by itself when its input ends (the run was closed, or died), at the latest `finish_timeout` seconds
later.
"""

import glob
import http.client
import netrc
import os
import shlex
import signal
import ssl
import sys
import time
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlparse

from atropos_exp.parts.logger.remote_process import Report, Seen, brief, connect, end_within, record

DEFAULT_HOST = "https://api.wandb.ai"
_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")  # where a key of `wandb login` may be filed under
_PROBE_SECONDS = 5.0  # wandb itself takes all of init_timeout to find that there is no network
_NOT_STARTED = 10  # exit code of a session that has read no message yet

Settings = dict[str, Any]


def main() -> None:
    """Record what arrives on standard input, offline if W&B cannot be reached."""
    connected = connect()
    if connected is None:
        return
    settings, report = connected
    mode = resolved(settings["mode"])
    if mode == "online" and (problem := unreachable(min(_PROBE_SECONDS, settings["init_timeout"]))):
        report(f"no connection, recording offline: {problem}", "warning")
        mode = "offline"
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
            report(f"ended: {brief(error)}", "warning")
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
        report(f"no connection, {then}: {brief(error)}", "warning")
        return _NOT_STARTED
    # steps have an axis of their own, whatever W&B's counter says: a resumed run begins it anew
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    where = f"at {run.url}" if mode == "online" else f"offline; to upload: wandb sync {run.settings.sync_dir}"
    report(f"recording {where}", "info")
    seen = Seen(settings["seen"])
    told = record(lambda step, values: run.log({"step": step} | values), wandb.Table, report, seen)
    summary = {"status": "killed"} if told is None else told
    sync_dir = run.settings.sync_dir
    again = f"wandb sync {'--include-online ' if mode == 'online' else ''}{shlex.quote(sync_dir)}"
    end_within(
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
        resume="allow",
        **{key: settings[key] for key in ("id", "name", "project", "entity", "group", "job_type", "tags", "config")},
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


def resolved(mode: str) -> str:
    """`mode`, or what `auto` means for this user: WANDB_MODE, else online with an API key, else offline."""
    if mode != "auto":
        return mode
    return os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline")


def unreachable(seconds: float) -> str | None:
    """Why W&B's server does not answer within `seconds`; None if it does, whatever it says."""
    address = os.environ.get("WANDB_BASE_URL") or DEFAULT_HOST
    try:
        urllib.request.urlopen(address, timeout=seconds).close()
    except (urllib.error.HTTPError, ssl.SSLError, http.client.HTTPException, ValueError):
        return None  # somebody is there: wandb sees to the rest
    except OSError as error:
        reason = getattr(error, "reason", error)
        return None if isinstance(reason, ssl.SSLError) else f"{address} does not answer ({reason})"
    return None


def has_key() -> bool:
    """Whether this user has an API key of W&B, in the environment or where `wandb login` keeps it."""
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


if __name__ == "__main__":
    main()
