"""The process that runs the jobs of a local sweep, a bounded number at a time. `local.py` starts it.

It holds `local.lock` of the sweep while it lives. What it starts ends with it: by itself after SIGTERM, by the kernel
after a SIGKILL of this process.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from pydantic import TypeAdapter

from atropos_exp.processes.lifeline import die_with_parent, dying_with_parent
from atropos_exp.processes.locks import try_hold
from atropos_exp.runs.sweep_backend import Job
from atropos_exp.runs.sweep_folder import SweepFolder, outcome

LOCK = "local.lock"
CANCEL = "local.cancel"
POLL_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True)
class Orders:
    """What a supervisor is to do, as `local.py` writes it down for it."""

    num_slots: int  # jobs at a time
    devices: list[str]  # slot i sees device i, modulo their number; []: all see all
    timeout_s: float | None  # of one job
    grace_s: float  # between asking a job to end and killing it
    jobs: list[Job] = field(default_factory=list)
    parent: int | None = None  # the process with which it ends; None: it outlives its caller


ORDERS = TypeAdapter(Orders)


@dataclass(kw_only=True)
class Running:
    """A job whose process runs."""

    job: Job
    process: subprocess.Popen[bytes]
    slot: int
    started: float  # seconds since the epoch
    deadline: float  # monotonic
    request: str = ""  # why it was asked to end
    kill_at: float = float("inf")  # monotonic


class Supervisor:
    """Runs jobs in their order in `num_slots` slots, and notes what happens in events.jsonl."""

    def __init__(self, sweep: SweepFolder, orders: Orders) -> None:
        self._sweep = sweep
        self._orders = orders
        self._queue = deque(orders.jobs)
        self._running: list[Running] = []
        self._slots = list(range(orders.num_slots))
        self._stop = False

    def run(self) -> None:
        """Run all jobs to their end.

        A job has a deadline if the sweep sets one; the supervisor lives as long as its jobs do.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask_to_stop)
        try:
            while self._queue or self._running:
                self._cancel_requested()
                while self._queue and self._slots:
                    self._start(self._queue.popleft())
                for running in list(self._running):
                    self._look_after(running)
                time.sleep(POLL_SECONDS)
        finally:
            for running in self._running:
                _kill(running.process)

    def _ask_to_stop(self, number: int, frame: object) -> None:
        self._stop = True

    def _cancel_requested(self) -> None:
        path = self._sweep.path / CANCEL
        numbers: list[int] | None = []  # None: all
        if path.exists():
            numbers = json.loads(path.read_text())["numbers"]
            path.unlink()
        if self._stop:
            numbers = None
        for job in [job for job in self._queue if numbers is None or job.number in numbers]:
            self._queue.remove(job)
            self._note("ended", job, phase="cancelled", reason="cancelled before it started")
        for running in self._running:
            if numbers is None or running.job.number in numbers:
                self._ask(running, "cancelled")

    def _start(self, job: Job) -> None:
        slot = self._slots.pop(0)
        environment = dict(os.environ)
        if devices := self._orders.devices:
            environment["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
        if "OMP_NUM_THREADS" not in environment and (num_slots := self._orders.num_slots) > 1:
            environment["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // num_slots))
        started = time.time()
        with job.log.open("ab") as log:
            process = subprocess.Popen(
                job.command, cwd=job.cwd, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, preexec_fn=dying_with_parent(),
            )  # fmt: skip
        deadline = time.monotonic() + (self._orders.timeout_s or float("inf"))
        self._running.append(Running(job=job, process=process, slot=slot, started=started, deadline=deadline))
        self._note("started", job, pid=process.pid)

    def _look_after(self, running: Running) -> None:
        code = running.process.poll()
        now = time.monotonic()
        if code is None:
            if now > running.deadline and not running.request:
                self._ask(running, f"timeout: it took more than {(self._orders.timeout_s or 0) / 60:g} minutes")
            if now > running.kill_at:
                _kill(running.process)
            return
        _kill_group(running.process.pid)  # whatever it may have left in its session
        self._running.remove(running)
        self._slots = sorted([*self._slots, running.slot])
        job = running.job
        phase, reason = outcome(
            code=code, request=running.request, folder=job.run_folder, log=job.log, since=running.started
        )
        self._note("ended", job, phase=phase, reason=reason, code=code)

    def _ask(self, running: Running, why: str) -> None:
        if not running.request:
            running.request = why
            running.kill_at = time.monotonic() + self._orders.grace_s
            running.process.send_signal(signal.SIGTERM)

    def _note(self, event: str, job: Job, **facts: Any) -> None:
        self._sweep.note(event=event, number=job.number, time=time.time(), **facts)


def hold_lock(path: Path) -> IO[str] | None:
    """Take the lock of the one supervisor of a sweep, with its process id inside; None if another one has it."""
    for patience in (0.2, 0.4, 0.8, 0.0):  # somebody who asks whether it is held, holds it for a moment
        if (lock := try_hold(path, holder=str(os.getpid()))) is not None:
            return lock
        time.sleep(patience)
    return None


def main(arguments: Sequence[str]) -> int:
    """Run `SWEEP JOBS.json READY_FD`, as `local.py` starts it; a byte on READY_FD says that the jobs are queued."""
    sweep = SweepFolder(Path(arguments[0]))
    orders = ORDERS.validate_json(Path(arguments[1]).read_bytes())
    Path(arguments[1]).unlink()
    ready = int(arguments[2])
    if orders.parent is not None:
        die_with_parent(signal.SIGTERM)
        if os.getppid() != orders.parent:
            return 1  # it died before we could ask to be told
    lock = hold_lock(sweep.path / LOCK)
    if lock is None:
        os.write(ready, b"busy")
        return 2
    (sweep.path / CANCEL).unlink(missing_ok=True)
    for job in orders.jobs:
        sweep.note(event="queued", number=job.number, time=time.time())
    os.write(ready, b"ok")
    os.close(ready)
    Supervisor(sweep, orders).run()
    lock.close()
    return 0


def _kill(process: subprocess.Popen[bytes]) -> None:
    _kill_group(process.pid)
    process.kill()
    process.wait()


def _kill_group(leader: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
