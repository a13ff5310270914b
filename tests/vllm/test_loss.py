"""A vLLM server that dies, hangs or cannot start: noticed in time, by name, with nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atropos_exp.ranks import Ranks
from atropos_exp.sharding.resync import Resync
from atropos_exp.types import SamplingParams
from atropos_exp.wire import EngineError, EngineLost

pytestmark = pytest.mark.vllm

LONG = SamplingParams(temperature=1.0, top_p=1.0, top_k=0, max_tokens=250, stop_token_ids=(), seed=0)
PROMPT = np.array([3, 1, 4, 1, 5], dtype=np.int32)


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


@pytest.mark.timeout(600)
def test_killed_and_stopped_servers_are_noticed_and_replaced(tmp_path: Path, helpers: Any) -> None:
    """With the settings that ship: a stopped process is noticed within 30 s."""
    engine = helpers.start(tmp_path, helpers.random_model(tied=True, seed=0))
    try:
        trainer = helpers.HeldModel(helpers.random_model(tied=True, seed=1))
        publisher = helpers.manage(trainer, engine)
        resync = Resync(publisher, engine, Ranks(rank=0, world_size=1), max_restarts=2)
        resync.publish(3)

        pid = engine.process.pid
        threading.Timer(0.5, os.kill, (pid, signal.SIGKILL)).start()  # while it samples
        with pytest.raises(EngineLost, match=r"engine vllm: waited for 64 completions .*killed by SIGKILL"):
            engine.generate([PROMPT], LONG, num_samples=64)
        assert not is_alive(pid)
        samples = resync.through(lambda: engine.generate([PROMPT], LONG, num_samples=2))
        assert samples[0][0].policy_version == 3 and engine.process.pid != pid
        expected = helpers.logprobs(trainer.model, PROMPT, samples[0][0].token_ids, 1.0)
        np.testing.assert_allclose(samples[0][0].logprobs, expected, atol=1e-4)

        pid = engine.process.pid
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
    assert not is_alive(engine.process.pid)


@pytest.mark.timeout(600)
def test_no_orphan_survives_its_parent_and_starts_fail_by_name(tmp_path: Path, helpers: Any) -> None:
    helpers.random_model(tied=True, seed=0).save_pretrained(tmp_path / "model")
    root = Path(__file__).resolve().parents[2]
    script = textwrap.dedent(
        f"""
        import time
        from pathlib import Path
        import yaml
        from atropos_exp.engine.vllm import VLLMEngine
        values = yaml.safe_load(Path({str(root / "conf/engine/vllm.yaml")!r}).read_text())
        del values["_target_"]
        folder = Path({str(tmp_path)!r})
        client = VLLMEngine(**values).start(model_folder=folder / "model", device="cpu", log_folder=folder,
            max_sequence_length=32)
        print(client.process.pid, flush=True)
        time.sleep(600)
        """
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(root)}
    )
    try:
        # Meanwhile: a start that takes too long, and a folder without weights.
        with pytest.raises(EngineError, match=r"engine vllm did not start: waited 0\.5 s \(engine\.start_timeout_sec"):
            helpers.start(tmp_path / "slow", helpers.random_model(tied=True, seed=0), start_timeout_seconds=0.5)
        (tmp_path / "empty").mkdir()
        config = tmp_path / "empty" / "config.json"
        config.write_text((tmp_path / "model" / "config.json").read_text())
        with pytest.raises(EngineError, match=r"(?s)did not start: its process ended with exit code 70.*model weights"):
            helpers.settings().start(
                model_folder=config.parent, device="cpu", log_folder=tmp_path / "empty", max_sequence_length=32
            )
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_alive(pid)
        os.kill(pid, signal.SIGSTOP)  # so that it cannot watch its parent itself
        parent.kill()
        wait_until(lambda: not is_alive(pid), 10, "the server to end with its parent")
    finally:
        parent.kill()
        parent.communicate()
