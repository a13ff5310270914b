"""Several ranks on one machine: environment, exit codes, signals, nothing left running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from atropos_exp.parts.cluster import local
from atropos_exp.parts.cluster.local import Local
from tests.helpers.processes import is_alive

PLAIN = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "OMP_NUM_THREADS")}


def rank(tmp_path: Path, code: str) -> list[str]:
    """A command that writes its rank's environment, then runs `code`."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
    body = (
        "import os, signal, sys, time\n"
        "rank = int(os.environ['RANK'])\n"
        f"open({str(tmp_path)!r} + f'/{{rank}}', 'w').write(' '.join(os.environ[name] for name in {names!r}))\n" + code
    )
    return [sys.executable, "-c", body]


def test_one_process_is_the_rank_itself() -> None:
    assert Local(num_processes=1).launch(["false"], PLAIN) is None
    assert Local(num_processes=2).launch(["false"], {**PLAIN, "WORLD_SIZE": "2"}) is None


def test_every_rank_knows_its_place(tmp_path: Path) -> None:
    assert Local(num_processes=2).launch(rank(tmp_path, ""), PLAIN) == 0
    told = [(tmp_path / str(number)).read_text().split() for number in range(2)]
    assert [row[:5] for row in told] == [["0", "0", "2", "2", "127.0.0.1"], ["1", "1", "2", "2", "127.0.0.1"]]
    assert told[0][5] == told[1][5]
    assert int(told[0][6]) == max(1, len(os.sched_getaffinity(0)) // 2)


def test_a_failure_is_the_exit_code_and_ends_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "GRACE_SECONDS", 0.5)
    start = time.monotonic()
    # rank 1 fails; rank 0 would wait for it, as in a collective
    code = "sys.exit(7) if rank == 1 else time.sleep(60)"
    assert Local(num_processes=2).launch(rank(tmp_path, code), PLAIN) == 7
    assert time.monotonic() - start < 20


def test_a_killed_rank_is_128_and_the_signal(tmp_path: Path) -> None:
    code = "os.kill(os.getpid(), signal.SIGKILL) if rank == 0 else None"
    assert Local(num_processes=2).launch(rank(tmp_path, code), PLAIN) == 128 + 9


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_rank_once(tmp_path: Path, number: signal.Signals) -> None:
    code = (
        "got = []\n"
        "for number in (signal.SIGTERM, signal.SIGINT): signal.signal(number, lambda n, f: got.append(n))\n"
        f"open({str(tmp_path)!r} + f'/ready{{rank}}', 'w').close()\n"
        "deadline = time.time() + 30\n"
        "while not got and time.time() < deadline: time.sleep(0.02)\n"
        "time.sleep(0.3)\n"
        f"open({str(tmp_path)!r} + f'/got{{rank}}', 'w').write(repr(got))\n"
    )
    launcher = (
        "import sys; from atropos_exp.parts.cluster.local import Local\n"
        f"sys.exit(Local(num_processes=2).launch({rank(tmp_path, code)!r}))"
    )
    parent = subprocess.Popen([sys.executable, "-c", launcher], env=PLAIN)
    try:
        wait_for(lambda: all((tmp_path / f"ready{number}").exists() for number in range(2)))
        parent.send_signal(number)
        assert parent.wait(timeout=30) == 0
    finally:
        parent.kill()
    assert [(tmp_path / f"got{rank_}").read_text() for rank_ in range(2)] == [repr([int(number)])] * 2


def test_ranks_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    code = f"open({str(tmp_path)!r} + f'/pid{{rank}}', 'w').write(f'{{os.getpid()}}.')\ntime.sleep(60)"
    launcher = (
        f"from atropos_exp.parts.cluster.local import Local; Local(num_processes=2).launch({rank(tmp_path, code)!r})"
    )
    parent = subprocess.Popen([sys.executable, "-c", launcher], env=PLAIN)
    files = [tmp_path / f"pid{number}" for number in range(2)]
    wait_for(lambda: all(file.exists() and file.read_text().endswith(".") for file in files))
    parent.kill()
    parent.wait(timeout=30)
    wait_for(lambda: not any(is_alive(int(file.read_text()[:-1])) for file in files))


def wait_for(condition: object, seconds: float = 30.0) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
