"""A `Backend` on this machine: a supervisor process runs the jobs, so that its caller may leave."""

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from atropos_exp.errors import UserError
from atropos_exp.processes.locks import is_held
from atropos_exp.runs.atomic import write_atomic
from atropos_exp.runs.sweep_backend import Job
from atropos_exp.runs.sweep_folder import Phase, RunState, SweepFolder
from atropos_exp.sweep.supervisor import CANCEL, LOCK, ORDERS, Orders

START_SECONDS = 60.0  # for the supervisor to say that it has the jobs
KILL_SECONDS = 10.0  # for a killed supervisor to be gone


class LocalBackend:
    """A `Backend` with a supervisor process, whose `Orders` say what the arguments mean."""

    def __init__(
        self, sweep: SweepFolder, *, num_slots: int, devices: Sequence[str] = (), timeout_s: float | None = None,
        grace_s: float = 120.0,
    ) -> None:  # fmt: skip
        self._sweep = sweep
        self._orders = Orders(num_slots=num_slots, devices=list(devices), timeout_s=timeout_s, grace_s=grace_s)

    def submit(self, jobs: Sequence[Job], *, attached: bool) -> None:
        orders = replace(self._orders, jobs=list(jobs), parent=os.getpid() if attached else None)
        path = self._sweep.path / f".jobs.{os.getpid()}.json"
        write_atomic(path, ORDERS.dump_json(orders))
        receive, ready = os.pipe()
        try:
            with self._sweep.log_path("supervisor").open("ab") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "atropos_exp.sweep.supervisor", self._sweep.path, path, str(ready)],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, pass_fds=(ready,),
                )  # fmt: skip
            os.close(ready)
            answer = os.read(receive, 16) if select.select([receive], [], [], START_SECONDS)[0] else b""
        finally:
            os.close(receive)
            path.unlink(missing_ok=True)
        if answer == b"busy":
            process.wait()
            raise UserError(f"{self._sweep.path}: its runs are still being executed by process {self.supervisor()}; "
                            "wait for them (sweep wait), or sweep cancel")  # fmt: skip
        if answer != b"ok":
            process.kill()
            process.wait()
            raise UserError(f"the supervisor of the runs did not start within {START_SECONDS:.0f} s; "
                            f"see {self._sweep.log_path('supervisor')}")  # fmt: skip
        # it may outlive us; if not, somebody has to take note of its end
        threading.Thread(target=process.wait, name="end of the supervisor", daemon=True).start()

    def states(self) -> Mapping[int, RunState]:
        alive = self.supervisor() is not None  # asked first: what it writes before it ends is read below
        states: dict[int, RunState] = {}
        for event in self._sweep.events():
            number, when = event["number"], event["time"]
            if event["event"] == "queued":
                states[number] = RunState(phase=Phase.PENDING)
            elif event["event"] == "started":
                states[number] = RunState(phase=Phase.RUNNING, started=when)
            elif event["event"] == "ended":
                started = states[number].started if number in states else None
                states[number] = RunState(phase=Phase(event["phase"]), reason=event["reason"], started=started,
                                          ended=when)  # fmt: skip
        if alive:
            return states
        lost = "killed together with the process that looked after it"
        return {
            number: RunState(phase=Phase.KILLED, reason=lost, started=state.started)
            if state.phase is Phase.RUNNING
            else RunState(phase=Phase.CANCELLED, reason="never started: " + lost)
            if state.phase is Phase.PENDING
            else state
            for number, state in states.items()
        }

    def cancel(self, numbers: Sequence[int] | None = None) -> None:
        if self.supervisor() is not None:
            write_atomic(self._sweep.path / CANCEL, json.dumps({"numbers": list(numbers) if numbers else None}))

    def kill(self) -> None:
        pid = self.supervisor()
        if pid is None:
            return
        os.kill(pid, signal.SIGKILL)  # the kernel ends its jobs with it
        deadline = time.monotonic() + KILL_SECONDS
        while self.supervisor() == pid:
            if time.monotonic() > deadline:
                raise UserError(f"process {pid}, which runs the jobs, did not end {KILL_SECONDS:.0f} s after SIGKILL")
            time.sleep(0.02)

    def supervisor(self) -> int | None:
        """Return the process id of the supervisor while it lives. It holds the lock, so the id is its own."""
        path = self._sweep.path / LOCK
        return (int(path.read_text() or 0) or None) if is_held(path) else None
