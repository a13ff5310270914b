"""Services as real processes: restarted with backoff, given up by name, told to the API, gone with their owner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from atropos_exp.parts.atropos.client import AtroposClient, Registration
from atropos_exp.parts.atropos.registration import register
from atropos_exp.parts.atropos.supervisor import ProgramSupervisor, SupervisedProgram
from atropos_exp.processes.child import Child
from tests.helpers.processes import is_alive

REGISTER = """
import json, sys, time, urllib.request
body = json.dumps({"max_token_length": 9, "desired_name": "e", "weight": 1.0, "group_size": 2}).encode()
while True:
    request = urllib.request.Request(sys.argv[1] + "/register-env", body, {"content-type": "application/json"})
    if json.load(urllib.request.urlopen(request))["status"] == "success":
        break
    time.sleep(0.05)
time.sleep(600)
"""


def wait_until(condition: Callable[[], Any], what: str, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def service(name: str, folder: Path, *argv: str, **changes: Any) -> SupervisedProgram:
    return SupervisedProgram(
        name=name,
        launch=lambda: Child(argv, log=folder / f"{name}.log", environment=dict(os.environ)),
        **changes,
    )


@pytest.fixture
def registered(api: Any) -> AtroposClient:
    register(
        api.client,
        Registration(
            wandb_group="g", wandb_project="p", batch_size=4, max_token_len=9, checkpoint_dir="c",
            save_checkpoint_interval=2, starting_step=0, num_steps=9,
        ),
        take_over=False,
    )  # fmt: skip
    api.client.batch()
    client: AtroposClient = api.client
    return client


def test_a_dead_environment_is_disconnected_and_started_again(
    registered: AtroposClient, api: Any, tmp_path: Path
) -> None:
    supervisor = ProgramSupervisor(registered, max_restarts=3, backoff_seconds=0.05)
    environment = service("environment e", tmp_path, sys.executable, "-c", REGISTER, api.url)
    supervisor.add(environment)
    supervisor.start()
    try:
        wait_until(lambda: environment.env_id == 0, "it registers")
        first = environment.child
        assert first is not None
        os.kill(first.pid, signal.SIGKILL)
        wait_until(lambda: environment.env_id == 1, "it registers again, under a new number")
        assert environment.child is not first
        assert supervisor.counters["environment_restarts"] == 1
        assert registered.environment(1) is not None and registered.environment(2) is None
    finally:
        supervisor.stop()
    assert not environment.is_alive
    # Both numbers are out of the reckoning: with nobody connected the API divides by a weight of zero.
    assert registered.environment(0) is None
    assert registered.environment(1) is None


def test_environments_are_started_one_after_the_other_so_that_their_numbers_are_known(
    registered: AtroposClient, api: Any, tmp_path: Path
) -> None:
    supervisor = ProgramSupervisor(registered, max_restarts=3)
    services = [service(f"e{at}", tmp_path, sys.executable, "-c", REGISTER, api.url) for at in range(3)]
    for one in services:
        supervisor.add(one)
    supervisor.start()
    try:
        wait_until(lambda: all(one.env_id is not None for one in services), "all register")
        assert [one.env_id for one in services] == [0, 1, 2]
        assert supervisor.state().count("registered") == 3
    finally:
        supervisor.stop()


def test_a_service_that_keeps_dying_is_given_up_with_its_log(registered: AtroposClient, tmp_path: Path) -> None:
    supervisor = ProgramSupervisor(registered, max_restarts=2, backoff_seconds=0.01)
    broken = service(
        "environment broken",
        tmp_path,
        sys.executable,
        "-c",
        "print('ERROR first of all', flush=True); raise SystemExit('no such data set')",
    )
    supervisor.add(broken)
    supervisor.start()
    try:
        wait_until(lambda: supervisor.problem() is not None, "it is given up")
        problem = supervisor.problem()
        assert problem is not None
        assert "environment broken ended with exit code 1, 3 times in a row (atropos.max_restarts=2)" in problem
        assert "its first error: ERROR first of all; " in problem and "no such data set" in problem
        assert supervisor.errors() == {}, "its process is gone"
        assert supervisor.counters["services_given_up"] == 1
        assert supervisor.counters["environment_restarts"] == 2
    finally:
        supervisor.stop()


def test_one_environment_of_several_given_up_is_no_reason_to_stop(
    registered: AtroposClient, api: Any, tmp_path: Path
) -> None:
    supervisor = ProgramSupervisor(registered, max_restarts=0, backoff_seconds=0.01)
    broken = service("broken", tmp_path, sys.executable, "-c", "raise SystemExit(1)")
    sound = service("sound", tmp_path, sys.executable, "-c", REGISTER, api.url)
    supervisor.add(broken)
    supervisor.add(sound)
    supervisor.start()
    try:
        wait_until(lambda: broken.problem is not None and sound.env_id is not None, "one fails, one registers")
        assert supervisor.problem() is None
        assert "broken: given up; sound: process" in supervisor.state()
    finally:
        supervisor.stop()


def test_an_api_that_dies_is_started_again_and_its_environments_too(api: Any, tmp_path: Path) -> None:
    api.kill()
    supervisor = ProgramSupervisor(api.client, max_restarts=3, backoff_seconds=0.05)
    server = service(
        "Atropos API", tmp_path, sys.executable, "-m", "atroposlib.cli.run_api",
        "--host", "127.0.0.1", "--port", str(api.port), is_api=True,
    )  # fmt: skip
    environment = service("e", tmp_path, sys.executable, "-c", "import time; time.sleep(600)")
    supervisor.add(server)
    supervisor.add(environment)
    supervisor.start()
    try:
        wait_until(lambda: environment.is_alive, "it waits for the API, then starts")
        before = environment.child
        assert server.child is not None and before is not None
        os.kill(server.child.pid, signal.SIGKILL)
        wait_until(lambda: environment.is_alive and environment.child is not before, "both are back")
        assert server.is_alive
        assert not is_alive(before.pid)
        assert supervisor.counters["api_restarts"] == 1
        assert environment.num_deaths == 0, "it is not to blame"
    finally:
        supervisor.stop()
    assert not server.is_alive and not environment.is_alive


def test_a_program_that_cannot_be_started_is_a_problem_at_once(registered: AtroposClient, tmp_path: Path) -> None:
    supervisor = ProgramSupervisor(registered, max_restarts=3)
    supervisor.add(service("environment e", tmp_path, str(tmp_path / "nowhere")))
    supervisor.start()
    try:
        wait_until(lambda: supervisor.problem() is not None, "it is noticed")
        assert "environment e cannot be started" in (supervisor.problem() or "")
    finally:
        supervisor.stop()


@pytest.mark.parametrize("is_stopped", [False, True], ids=["running", "stopped"])
def test_nothing_outlives_the_process_that_started_it(is_stopped: bool, tmp_path: Path) -> None:
    """kill -9 of the owner, with a child that has a grandchild in a session of its own."""
    owner_code = f"""
import os, sys, time
from pathlib import Path
from atropos_exp.processes.child import Child
code = "import subprocess, time; print(subprocess.Popen(['setsid', 'sleep', '600']).pid, flush=True); time.sleep(600)"
child = Child([sys.executable, "-c", code], log=Path({str(tmp_path / "log")!r}), environment=dict(os.environ))
print(child.pid, flush=True)
time.sleep(600)
"""
    owner = subprocess.Popen([sys.executable, "-c", owner_code], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    child = int(owner.stdout.readline())
    wait_until(lambda: (tmp_path / "log").read_text().strip(), "the grandchild starts")
    grandchild = int((tmp_path / "log").read_text())
    assert is_alive(child) and is_alive(grandchild)
    if is_stopped:
        os.kill(child, signal.SIGSTOP)
    owner.kill()
    owner.wait(10)
    owner.stdout.close()
    wait_until(lambda: not is_alive(child) and not is_alive(grandchild), "both are gone", 15)
