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
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from atropos_exp.processes.lifeline import die_with_parent, dying_with_parent
from atropos_exp.processes.locks import try_hold
from atropos_exp.runs.sweep_backend import Job
from atropos_exp.runs.sweep_folder import SweepFolder, outcome

LOCK = "local.lock"
CANCEL = "local.cancel"
POLL_SECONDS = 0.1


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

    def __init__(
        self, sweep: SweepFolder, jobs: Sequence[Job], *, num_slots: int, devices: Sequence[str],
        timeout_s: float | None, grace_s: float,
    ) -> None:  # fmt: skip
        self._sweep = sweep
        self._queue = deque(jobs)
        self._running: list[Running] = []
        self._slots = list(range(num_slots))
        self._num_slots = num_slots
        self._devices = devices
        self._timeout_s = timeout_s
        self._grace_s = grace_s
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
        numbers: list[int] | None = None  # None: nobody asked
        if path.exists():
            numbers = json.loads(path.read_text())["numbers"]
            path.unlink()
            numbers = numbers if numbers is not None else self._all_numbers()
        if self._stop:
            numbers = self._all_numbers()
        for number in numbers or ():
            for job in [job for job in self._queue if job.number == number]:
                self._queue.remove(job)
                self._note("ended", job, phase="cancelled", reason="cancelled before it started")
            for running in self._running:
                if running.job.number == number:
                    self._ask(running, "cancelled")

    def _all_numbers(self) -> list[int]:
        return [job.number for job in self._queue] + [running.job.number for running in self._running]

    def _start(self, job: Job) -> None:
        slot = self._slots.pop(0)
        environment = {**os.environ, **job.environment}
        if self._devices:
            environment["CUDA_VISIBLE_DEVICES"] = self._devices[slot % len(self._devices)]
        if "OMP_NUM_THREADS" not in environment and self._num_slots > 1:
            environment["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // self._num_slots))
        started = time.time()
        with job.log.open("ab") as log:
            process = subprocess.Popen(
                job.command, cwd=job.cwd, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, preexec_fn=dying_with_parent(),
            )  # fmt: skip
        deadline = time.monotonic() + (self._timeout_s or float("inf"))
        self._running.append(Running(job=job, process=process, slot=slot, started=started, deadline=deadline))
        self._note("started", job, pid=process.pid)

    def _look_after(self, running: Running) -> None:
        code = running.process.poll()
        now = time.monotonic()
        if code is None:
            if now > running.deadline and not running.request:
                self._ask(running, f"timeout: it took more than {(self._timeout_s or 0) / 60:g} minutes")
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
            running.kill_at = time.monotonic() + self._grace_s
            running.process.send_signal(signal.SIGTERM)

    def _note(self, event: str, job: Job, **facts: Any) -> None:
        self._sweep.note(event=event, number=job.number, time=time.time(), **facts)


def hold_lock(path: Path) -> IO[str] | None:
    """Take the lock of the one supervisor of a sweep, with its process id inside; None if another one has it."""
    for patience in (0.2, 0.4, 0.8):  # somebody who asks whether it is held, holds it for a moment
        if (lock := try_hold(path, holder=str(os.getpid()))) is not None:
            return lock
        time.sleep(patience)
    return try_hold(path, holder=str(os.getpid()))


def main(arguments: Sequence[str]) -> int:
    """Run `SWEEP JOBS.json READY_FD`, as `local.py` starts it; a byte on READY_FD says that the jobs are queued."""
    sweep = SweepFolder(Path(arguments[0]))
    spec = json.loads(Path(arguments[1]).read_text())
    Path(arguments[1]).unlink()
    ready = int(arguments[2])
    if spec["parent"] is not None:
        die_with_parent(signal.SIGTERM)
        if os.getppid() != spec["parent"]:
            return 1  # it died before we could ask to be told
    lock = hold_lock(sweep.path / LOCK)
    if lock is None:
        os.write(ready, b"busy")
        return 2
    (sweep.path / CANCEL).unlink(missing_ok=True)
    jobs = [
        Job(**{**job, "cwd": Path(job["cwd"]), "log": Path(job["log"]), "run_folder": Path(job["run_folder"])})
        for job in spec["jobs"]
    ]
    for job in jobs:
        sweep.note(event="queued", number=job.number, time=time.time())
    supervisor = Supervisor(
        sweep, jobs, num_slots=spec["num_slots"], devices=spec["devices"], timeout_s=spec["timeout_s"],
        grace_s=spec["grace_s"],
    )  # fmt: skip
    os.write(ready, b"ok")
    os.close(ready)
    supervisor.run()
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
