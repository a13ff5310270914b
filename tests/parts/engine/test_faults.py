"""Servers that stop, die, never start or lose their parent: noticed in time, by name, with nothing left behind."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from atropos_exp.errors import EngineError, UserError
from atropos_exp.parts.engine.servers import Servers
from atropos_exp.types import SamplingParams
from tests.helpers.engines import first_number, start_engine, start_in_another_process
from tests.helpers.processes import is_alive, wait_until
from tests.helpers.random_models import random_prompts

HEALTH_SECONDS = 3.0
LONG = SamplingParams(temperature=1.0, top_p=1.0, top_k=0, max_tokens=32, stop_token_ids=(), seed=0)


def open_fds() -> set[str]:
    return {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _exists(fd)}


def _exists(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


def start(model_folder: Path, log_folder: Path, **changes: Any) -> Servers:
    return start_engine(
        "hf", log_folder, model_folder, max_length=48, **{"health_timeout_seconds": HEALTH_SECONDS, **changes}
    )


@pytest.mark.slow
def test_signals_hangs_and_death(model_folder: Path, tmp_path: Path) -> None:
    fds = open_fds()
    with ThreadPoolExecutor(1) as background:  # a thread that ends must not take the server along
        engine = background.submit(start, model_folder, tmp_path).result()
    pid = engine.replicas[0].process.pid
    try:
        for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(pid, ignored)
        engine.check()

        # A request that takes longer than the health timeout is fine as long as the server shows life.
        engine.replicas[0].pause()
        threading.Timer(2 * HEALTH_SECONDS, engine.replicas[0].resume).start()
        started = time.monotonic()
        engine.generate(random_prompts([4]), LONG, num_samples=1)
        assert time.monotonic() - started > HEALTH_SECONDS

        os.kill(pid, signal.SIGSTOP)
        for call in (engine.check, lambda: engine.generate(random_prompts([4]), LONG, num_samples=1)):
            started = time.monotonic()
            with pytest.raises(EngineError, match=r"no sign of life for 3 s .*it hangs"):
                call()
            assert time.monotonic() - started < 20
        os.kill(pid, signal.SIGCONT)
        engine.check()

        # Killed under a request that waits.
        engine.replicas[0].pause()
        threading.Timer(0.5, os.kill, (pid, signal.SIGKILL)).start()
        started = time.monotonic()
        with pytest.raises(EngineError, match=r"16 completions of 1 prompts.*killed by SIGKILL") as raised:
            engine.generate(random_prompts([4]), LONG, num_samples=16)
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
    parent = start_in_another_process("hf", model_folder, tmp_path)
    try:
        pid = first_number(parent)
        assert is_alive(pid)
        os.kill(pid, signal.SIGSTOP)
        parent.kill()
        wait_until(lambda: not is_alive(pid), "the server to end with its parent", 10)
    finally:
        parent.kill()
        parent.communicate()


def test_a_server_that_cannot_start_tells_why(model_folder: Path, tmp_path: Path) -> None:
    fds = open_fds()
    failing = tmp_path / "python"
    failing.write_text("#!/bin/sh\necho no room on this machine\nexit 7\n")
    failing.chmod(0o755)
    with pytest.raises(
        EngineError, match=r"(?s)did not start: its process ended with exit code 7.*no room on this mach"
    ):
        start(model_folder, tmp_path, python=str(failing))
    with pytest.raises(EngineError, match=r"waited 0\.3 s \(engine\.start_timeout_seconds\) for the server to load"):
        start(model_folder, tmp_path, start_timeout_seconds=0.3)
    assert open_fds() <= fds


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no model in .*nothing_here: it has no config\.json"):
        start(tmp_path / "nothing_here", tmp_path)


def test_a_context_that_is_too_short_is_named(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has a context of 512 tokens, but max_prompt_length .* is 513; lower"):
        start_engine("hf", tmp_path, model_folder, max_length=513)


def test_a_sequence_must_fit_a_batch(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"engine\.max_batch_tokens is 8, but one sequence may have 48 tokens"):
        start(model_folder, tmp_path, max_batch_tokens=8)
