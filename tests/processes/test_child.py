"""A program whose guard is killed: the kernel kills the program, and `Child` sees to the rest before it says so."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from atropos_exp.processes import guard
from atropos_exp.processes.child import Child
from atropos_exp.processes.group import ProcessGroup
from atropos_exp.processes.ports import HeldPort
from tests.helpers.processes import descendants, is_alive, wait_until

# Inherits a listening socket, as an engine does, and shares it with a process of its own, as vLLM's may.
PROGRAM = """
import subprocess, sys, time
held = bytearray(200 << 20)  # takes a while to give back
held[::4096] = b"x" * len(held[::4096])
subprocess.Popen([sys.executable, "-c", "import time; print('both', flush=True); time.sleep(600)"], close_fds=False)
time.sleep(600)
"""


@pytest.fixture
def port() -> Iterator[HeldPort]:
    held = HeldPort()
    yield held
    held.close()


def start(port: HeldPort, folder: Path) -> Child:
    with port.listen() as listener:
        os.set_inheritable(listener.fileno(), True)
        fds = [listener.fileno()]
        child = Child([sys.executable, "-c", PROGRAM], log=folder / "log", environment=dict(os.environ), pass_fds=fds)
    wait_until(lambda: "both" in child.log_tail(), "the program to run", 60)
    return child


def guard_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_a_port_is_free_once_the_program_of_a_killed_guard_has_ended(port: HeldPort, tmp_path: Path) -> None:
    for number in range(3):
        child = start(port, tmp_path / str(number))
        guard, started = guard_of(child.pid), [child.pid, *descendants(child.pid)]
        assert len(started) == 2
        os.kill(guard, signal.SIGKILL)
        child.stop()
        assert child.poll() == -signal.SIGKILL
        assert not any(is_alive(pid) for pid in started)
        port.listen().close()  # raises while anything of it is left


def test_a_guard_that_is_killed_before_it_has_started_the_program_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tmp_path / "first"
    dying = tmp_path / "guard.py"
    dying.write_text(
        f"import os, pathlib, runpy, signal\nfirst = pathlib.Path({str(first)!r})\n"
        "if not first.exists():\n    first.touch()\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        f"runpy.run_path({guard.__file__!r}, run_name='__main__')\n"
    )
    monkeypatch.setattr("atropos_exp.processes.child._GUARD", dying)
    child = Child(["sleep", "600"], log=tmp_path / "log", environment=dict(os.environ))
    try:
        assert first.exists() and child.poll() is None
    finally:
        child.stop()


def test_a_guard_that_hangs_is_killed_with_all_that_it_guards(
    port: HeldPort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("atropos_exp.processes.child.STOP_SECONDS", 1.0)
    child = start(port, tmp_path)
    started = [child.pid, *descendants(child.pid)]
    os.kill(guard_of(child.pid), signal.SIGSTOP)
    child.stop()
    wait_until(lambda: not any(is_alive(pid) for pid in started), "the program to be gone", 30)
    port.listen().close()


def test_a_group_of_another_process_with_the_same_id_is_left_alone(port: HeldPort, tmp_path: Path) -> None:
    child = start(port, tmp_path)
    try:
        group = ProcessGroup(child.pid)
        group._born = 1  # as if the number had belonged to another process when the group was made
        assert group.end(1.0)
        assert child.poll() is None
    finally:
        child.stop()
