"""A vLLM server that dies, hangs or cannot start: noticed in time, by name, with nothing left behind."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atropos_exp.assembly.resync import Resync
from atropos_exp.errors import EngineError, EngineLost
from atropos_exp.processes.ranks import Ranks
from atropos_exp.types import SamplingParams
from tests.helpers.engines import first_number, start_engine, start_in_another_process
from tests.helpers.processes import is_alive, wait_until
from tests.helpers.publishing import HeldModel, manage
from tests.helpers.random_models import completion_logprobs, random_model

pytestmark = pytest.mark.vllm

LONG = SamplingParams(temperature=1.0, top_p=1.0, top_k=0, max_tokens=250, stop_token_ids=(), seed=0)
PROMPT = np.array([3, 1, 4, 1, 5], dtype=np.int32)


@pytest.mark.timeout(600)
def test_killed_and_stopped_servers_are_noticed_and_replaced(tmp_path: Path, start: Any) -> None:
    """With the settings that ship: a stopped process is noticed within 30 s."""
    engine = start(tmp_path, random_model(seed=0))
    try:
        trainer = HeldModel(random_model(seed=1))
        publisher = manage(trainer, engine)
        resync = Resync(publisher, engine, Ranks(rank=0, world_size=1), max_restarts=2)
        resync.publish(3)

        pid = engine.replicas[0].process.pid
        threading.Timer(0.5, os.kill, (pid, signal.SIGKILL)).start()  # while it samples
        with pytest.raises(EngineLost, match=r"engine vllm: waited for 64 completions .*killed by SIGKILL"):
            engine.generate([PROMPT], LONG, num_samples=64)
        assert not is_alive(pid)
        samples = resync.through(lambda: engine.generate([PROMPT], LONG, num_samples=2))
        assert samples[0][0].policy_version == 3 and engine.replicas[0].process.pid != pid
        expected = completion_logprobs(trainer.model, PROMPT, samples[0][0].token_ids)
        np.testing.assert_allclose(samples[0][0].logprobs, expected, atol=1e-4)

        pid = engine.replicas[0].process.pid
        os.kill(pid, signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises(EngineLost, match=r"no sign of life for 20 s \(engine\.health_timeout_seconds\): it hangs"):
            engine.generate([PROMPT], LONG, num_samples=2)
        assert time.monotonic() - started < 30
        samples = resync.through(lambda: engine.generate([PROMPT], LONG, num_samples=2))
        assert samples[0][0].policy_version == 3
        assert not is_alive(pid)
        assert (resync.num_restarts, publisher.num_verified) == (2, 3)
    finally:
        engine.stop()
    assert not is_alive(engine.replicas[0].process.pid)


@pytest.mark.timeout(600)
def test_no_orphan_survives_its_parent_and_starts_fail_by_name(tmp_path: Path, start: Any) -> None:
    random_model(seed=0).save_pretrained(tmp_path / "model")
    parent = start_in_another_process("vllm", tmp_path / "model", tmp_path)
    try:
        # Meanwhile: a start that takes too long, and a folder without weights.
        with pytest.raises(EngineError, match=r"engine vllm did not start: waited 0\.5 s \(engine\.start_timeout_sec"):
            start(tmp_path / "slow", random_model(seed=0), start_timeout_seconds=0.5)
        (tmp_path / "empty").mkdir()
        config = tmp_path / "empty" / "config.json"
        config.write_text((tmp_path / "model" / "config.json").read_text())
        with pytest.raises(EngineError, match=r"(?s)did not start: its process ended with exit code 70.*model weights"):
            start_engine("vllm", config.parent, config.parent, max_length=32)
        pid = first_number(parent)
        assert is_alive(pid)
        os.kill(pid, signal.SIGSTOP)  # so that it cannot watch its parent itself
        parent.kill()
        wait_until(lambda: not is_alive(pid), "the server ends with its parent", 10)
    finally:
        parent.kill()
        parent.communicate()
