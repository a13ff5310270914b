"""Servers that stop, die, never start or lose their parent: noticed in time, by name, with nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from atropos_exp.types import SamplingParams, UserError
from atropos_exp.wire import EngineError

HEALTH_SECONDS = 3.0
LONG = SamplingParams(temperature=1.0, top_p=1.0, top_k=0, max_tokens=32, stop_token_ids=(), seed=0)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.05)


def open_fds() -> set[str]:
    return {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _exists(fd)}


def _exists(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


def start_parent(script: str) -> tuple[subprocess.Popen[str], int]:
    """A process that starts another and prints its id."""
    root = str(Path(__file__).resolve().parents[2])
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": root}
    )
    assert parent.stdout is not None
    line = parent.stdout.readline()
    if not line:
        parent.communicate()
        pytest.fail("the parent printed nothing; its error is above")
    return parent, int(line)


def start(helpers: Any, model_folder: Path, log_folder: Path, **changes: Any) -> Any:
    return helpers.settings(health_timeout_seconds=HEALTH_SECONDS, **changes).start(
        model_folder=model_folder, device="cpu", log_folder=log_folder, max_sequence_length=helpers.max_length
    )


def test_signals_hangs_and_death(helpers: Any, model_folder: Path, tmp_path: Path) -> None:
    fds = open_fds()
    with ThreadPoolExecutor(1) as background:  # a thread that ends must not take the server along
        engine = background.submit(start, helpers, model_folder, tmp_path).result()
    pid = engine.process.pid
    try:
        assert "--parent-death-signal" not in Path(f"/proc/{pid}/cmdline").read_text()
        for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(pid, ignored)
        engine.check()

        # A request that takes longer than the health timeout is fine as long as the server shows life.
        engine.pause()
        threading.Timer(2 * HEALTH_SECONDS, engine.resume).start()
        started = time.monotonic()
        engine.generate(helpers.random_prompts([4]), LONG, num_samples=1)
        assert time.monotonic() - started > HEALTH_SECONDS

        os.kill(pid, signal.SIGSTOP)
        for call in (engine.check, lambda: engine.generate(helpers.random_prompts([4]), LONG, num_samples=1)):
            started = time.monotonic()
            with pytest.raises(EngineError, match=r"no sign of life for 3 s .*it hangs"):
                call()
            assert time.monotonic() - started < 20
        os.kill(pid, signal.SIGCONT)
        engine.check()

        # Killed under a request that waits.
        engine.pause()
        threading.Timer(0.5, os.kill, (pid, signal.SIGKILL)).start()
        started = time.monotonic()
        with pytest.raises(EngineError, match=r"16 completions of 1 prompts.*killed by SIGKILL") as raised:
            engine.generate(helpers.random_prompts([4]), LONG, num_samples=16)
        assert time.monotonic() - started < 10
        assert "serving" in str(raised.value)  # the last lines of its log
        with pytest.raises(EngineError, match="killed by SIGKILL"):
            engine.check()
    finally:
        engine.stop()
        engine.stop()  # twice is fine
    assert not is_alive(pid)
    assert open_fds() <= fds  # sockets, the log, and the shared memory, which has no name elsewhere


def test_no_orphan_survives_its_parent(model_folder: Path, tmp_path: Path) -> None:
    """A killed parent, and a server that is stopped, so that it cannot watch its parent itself."""
    script = textwrap.dedent(
        f"""
        import time
        from pathlib import Path
        from atropos_exp.engine.hf import HFEngine
        engine = HFEngine(dtype="float32", python=None, gpus=None, data_parallel_size=1,
            num_threads=1, max_batch_tokens=4096, batching_wait_seconds=0.0,
            transport="shm", start_timeout_seconds=120, request_timeout_seconds=60, health_timeout_seconds=20,
            max_restarts=0)
        folder = Path({str(tmp_path)!r})
        client = engine.start(model_folder=Path({str(model_folder)!r}), device="cpu", log_folder=folder,
            max_sequence_length=32)
        print(client.process.pid, flush=True)
        time.sleep(600)
        """
    )
    parent, pid = start_parent(script)
    try:
        assert is_alive(pid)
        os.kill(pid, signal.SIGSTOP)
        parent.kill()
        wait_until(lambda: not is_alive(pid), 10, "the server to end with its parent")
    finally:
        parent.kill()
        parent.communicate()


def test_a_server_without_the_kernels_help_still_ends(tmp_path: Path) -> None:
    """Started from a thread other than the main one, it polls for its parent instead."""
    script = textwrap.dedent(
        """
        import os, sys, time
        from atropos_exp.engine.server import die_with
        parent = os.getpid()
        if (child := os.fork()) == 0:
            die_with(parent, at_once=False)
            time.sleep(600)
        print(child, flush=True)
        time.sleep(1)
        os.kill(parent, 9)
        """
    )
    parent, child = start_parent(script)
    parent.communicate(timeout=30)
    wait_until(lambda: not is_alive(child), 10, "the child to end")


def test_a_server_that_cannot_start_tells_why(helpers: Any, model_folder: Path, tmp_path: Path) -> None:
    fds = open_fds()
    failing = tmp_path / "python"
    failing.write_text("#!/bin/sh\necho no room on this machine\nexit 7\n")
    failing.chmod(0o755)
    with pytest.raises(
        EngineError, match=r"(?s)did not start: its process ended with exit code 7.*no room on this mach"
    ):
        start(helpers, model_folder, tmp_path, python=str(failing))
    with pytest.raises(EngineError, match=r"waited 0\.3 s \(engine\.start_timeout_seconds\) for the server to load"):
        start(helpers, model_folder, tmp_path, start_timeout_seconds=0.3)
    assert open_fds() <= fds


def test_a_folder_without_a_model_is_named(helpers: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no model in .*nothing_here: it has no config\.json"):
        start(helpers, tmp_path / "nothing_here", tmp_path)


def test_a_context_that_is_too_short_is_named(helpers: Any, model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has a context of 64 tokens, but max_prompt_length .* is 65; lower"):
        helpers.settings().start(model_folder=model_folder, device="cpu", log_folder=tmp_path, max_sequence_length=65)


def test_a_sequence_must_fit_a_batch(helpers: Any, model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"engine\.max_batch_tokens is 8, but one sequence may have 48 tokens"):
        start(helpers, model_folder, tmp_path, max_batch_tokens=8)
