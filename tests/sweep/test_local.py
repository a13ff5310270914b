"""The backend of this machine, with small commands as jobs: bounds, deadlines, cancelling, and no process left over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from atropos_exp.errors import UserError
from atropos_exp.runs.sweep_backend import Job
from atropos_exp.runs.sweep_folder import Phase, RunState, SweepFolder
from atropos_exp.sweep.local import LocalBackend
from tests.helpers.paths import ROOT

# Notes that it started, with its device; ends well after `seconds`. "stubborn" ignores SIGTERM.
JOB = """
import os, signal, sys, time
mark, seconds, how = sys.argv[1], float(sys.argv[2]), sys.argv[3]
if how == "stubborn": signal.signal(signal.SIGTERM, signal.SIG_IGN)
with open(mark, "a") as file: print(time.time(), os.environ.get("CUDA_VISIBLE_DEVICES"), file=file, flush=True)
time.sleep(seconds)
with open(mark, "a") as file: print(time.time(), "end", file=file, flush=True)
if how == "fail": sys.exit("it broke at the third beam")
"""


@pytest.fixture
def sweep(tmp_path: Path) -> Iterator[SweepFolder]:
    yield SweepFolder(tmp_path)
    LocalBackend(SweepFolder(tmp_path), num_slots=1).kill()


def job(sweep: SweepFolder, number: int, *, seconds: float = 0.3, how: str = "") -> Job:
    mark = sweep.path / f"mark_{number}"
    return Job(
        number=number, name=f"job {number}", command=[sys.executable, "-c", JOB, str(mark), str(seconds), how],
        cwd=sweep.path, log=sweep.log_path(f"{number:03d}"), run_folder=sweep.run_folder(number),
    )  # fmt: skip


def wait(backend: LocalBackend, until: Callable[[dict[int, RunState]], bool] | None = None) -> dict[int, RunState]:
    """Until the condition holds, by default until every job has ended."""
    deadline = time.monotonic() + 60
    while True:
        states = dict(backend.states())
        if until(states) if until else not any(state.phase.is_open for state in states.values()):
            return states
        assert time.monotonic() < deadline, states
        time.sleep(0.05)


def is_running(number: int) -> Callable[[dict[int, RunState]], bool]:
    return lambda states: states[number].phase is Phase.RUNNING


def has_started(sweep: SweepFolder, number: int) -> Callable[[dict[int, RunState]], bool]:
    return lambda _: (sweep.path / f"mark_{number}").exists()


def processes_of(sweep: SweepFolder) -> list[str]:
    """Command lines of living processes that name this sweep's folder."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            stopped = (folder / "stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX"
        except OSError:
            continue
        if str(sweep.path) in line and int(folder.name) != os.getpid() and not stopped:
            found.append(line)
    return found


def assert_nothing_is_left(sweep: SweepFolder) -> None:
    deadline = time.monotonic() + 20
    while left := processes_of(sweep):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def spans(sweep: SweepFolder, numbers: range) -> list[tuple[float, float]]:
    lines = [(sweep.path / f"mark_{number}").read_text().splitlines() for number in numbers]
    return [(float(first.split()[0]), float(last.split()[0])) for first, last in lines]


def test_no_more_jobs_at_once_than_slots_and_devices_go_round(sweep: SweepFolder) -> None:
    backend = LocalBackend(sweep, num_slots=3, devices=["4", "7"])
    backend.submit([job(sweep, number) for number in range(7)], attached=False)
    states = wait(backend)
    # the jobs are no runs: they write no summary.json, so "exit code 0" is all that is known of them
    assert all(state.ended is not None for state in states.values())
    times = spans(sweep, range(7))
    most = max(sum(start <= moment < end for start, end in times) for moment, _ in times)
    assert most == 3
    devices = {(sweep.path / f"mark_{number}").read_text().split()[1] for number in range(7)}
    assert devices == {"4", "7"}
    assert_nothing_is_left(sweep)


def test_a_failure_has_its_reason_and_stops_no_other(sweep: SweepFolder) -> None:
    backend = LocalBackend(sweep, num_slots=1)
    backend.submit([job(sweep, 0, how="fail"), job(sweep, 1)], attached=False)
    states = wait(backend)
    assert (states[0].phase, states[0].reason) == (Phase.FAILED, "it broke at the third beam")
    assert (sweep.path / "mark_1").exists()


def test_a_deadline_ends_a_job_and_its_grace_ends_a_stubborn_one(sweep: SweepFolder) -> None:
    backend = LocalBackend(sweep, num_slots=2, timeout_s=1.0, grace_s=1.0)
    start = time.monotonic()
    backend.submit([job(sweep, 0, seconds=300), job(sweep, 1, seconds=300, how="stubborn")], attached=False)
    states = wait(backend)
    assert [states[at].phase for at in (0, 1)] == [Phase.TIMEOUT, Phase.TIMEOUT]
    assert states[0].reason == "timeout: it took more than 0.0166667 minutes"
    assert time.monotonic() - start < 30
    assert_nothing_is_left(sweep)


def test_cancelling_some_and_all(sweep: SweepFolder) -> None:
    backend = LocalBackend(sweep, num_slots=1, grace_s=5.0)
    backend.submit([job(sweep, number, seconds=300) for number in range(3)], attached=False)
    wait(backend, is_running(0))
    backend.cancel([0])
    states = wait(backend, is_running(1))
    assert states[0].phase is Phase.CANCELLED
    backend.cancel()
    states = wait(backend)
    assert [states[at].phase for at in range(3)] == [Phase.CANCELLED] * 3
    assert states[2].reason == "cancelled before it started"
    assert_nothing_is_left(sweep)


def test_a_killed_job_and_a_killed_supervisor(sweep: SweepFolder) -> None:
    backend = LocalBackend(sweep, num_slots=2)
    backend.submit([job(sweep, number, seconds=300) for number in range(3)], attached=False)
    wait(backend, is_running(0))
    pid = next(event["pid"] for event in sweep.events() if event["event"] == "started" and event["number"] == 0)
    os.kill(pid, signal.SIGKILL)
    states = wait(backend, is_running(2))
    assert (states[0].phase, states[0].reason) == (Phase.KILLED, "killed by SIGKILL")
    supervisor = backend.supervisor()
    assert supervisor is not None
    os.kill(supervisor, signal.SIGKILL)
    assert_nothing_is_left(sweep)
    states = wait(backend)
    assert [states[at].phase for at in range(3)] == [Phase.KILLED] * 3
    assert "the process that looked after it" in states[1].reason


def test_a_second_submission_while_the_first_runs_is_refused(sweep: SweepFolder) -> None:
    backend = LocalBackend(sweep, num_slots=1)
    backend.submit([job(sweep, 0, seconds=300)], attached=False)
    with pytest.raises(UserError, match=f"still being executed by process {backend.supervisor()}"):
        LocalBackend(sweep, num_slots=1).submit([job(sweep, 1)], attached=False)
    backend.kill()
    backend.submit([job(sweep, 1)], attached=False)
    wait(backend)
    assert (sweep.path / "mark_1").exists()


def test_jobs_end_with_a_submitter_that_stayed_and_outlive_one_that_left(sweep: SweepFolder) -> None:
    code = (
        "import sys, time; from pathlib import Path\n"
        "from tests.sweep.test_local import job, LocalBackend, SweepFolder\n"
        "sweep = SweepFolder(Path(sys.argv[1])); backend = LocalBackend(sweep, num_slots=1, grace_s=2.0)\n"
        "backend.submit([job(sweep, 0, seconds=300)], attached=sys.argv[2] == 'stays')\n"
        "time.sleep(300)\n"
    )
    backend = LocalBackend(sweep, num_slots=1)
    environ = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    for how in ("leaves", "stays"):
        (sweep.path / "mark_0").unlink(missing_ok=True)
        with subprocess.Popen([sys.executable, "-c", code, str(sweep.path), how], env=environ) as submitter:
            wait(backend, has_started(sweep, 0))
            submitter.kill()
        if how == "leaves":
            time.sleep(1.0)
            assert backend.states()[0].phase is Phase.RUNNING
            backend.kill()
        assert_nothing_is_left(sweep)
    assert wait(backend)[0].phase is Phase.CANCELLED
