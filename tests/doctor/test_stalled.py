"""A real run whose engine is stopped half way: the doctor names the process and what the run waits for. And what the
same program needed of memory, against the estimate."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from atropos_exp.doctor import memory
from atropos_exp.doctor.after import explain
from atropos_exp.doctor.line import Level
from atropos_exp.doctor.stalled import ROLES, _newest, _stage, watch
from atropos_exp.parts.model.tiny import WEIGHTS
from atropos_exp.runs.checkpoints import Checkpoints
from tests.helpers.paths import ROOT

SMALL = ("rollout=local", "eval.num_prompts=8", "eval.every=0", "eval.samples_per_prompt=0", "logger=none")
MEASURED = """
import resource, sys
from atropos_exp.run import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def until(what: Callable[[], Any], said: str, seconds: float = 150) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, f"{said}: not within {seconds:.0f} s"
        time.sleep(0.05)
    return found


@pytest.mark.slow
def test_a_stopped_engine_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = subprocess.Popen(
        [sys.executable, "-m", "atropos_exp.run", *SMALL, "batch_size=4", "group_size=4", "trainer.max_steps=100000",
         "engine.health_timeout_seconds=600", f"output_dir={tmp_path}", f"run_dir={folder}"],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        metrics = folder / "metrics.jsonl"
        until(lambda: run.poll() is not None or (metrics.exists() and metrics.read_text().count("\n") > 2), "two steps")
        assert run.poll() is None, run.communicate()[0]
        (line, *_) = explain(folder)
        assert line.level is Level.ok and "running" in line.text
        (engine,) = [process.pid for process in watch(run.pid) if process.role == "engine server"]
        os.kill(engine, signal.SIGSTOP)
        time.sleep(3)
        line = next(line for line in explain(folder, patience=1.0) if line.topic == "stalled")
        assert line.level is Level.fail
        assert re.search(rf"engine server \(process {engine}\) is stopped", line.text), line.text
        assert "engine.log" in line.text and line.remedy == f"kill -CONT {engine} lets it go on"
        assert "trainer" in "\n".join(str(one) for one in explain(folder, patience=1.0) if one.topic == "process")
        os.kill(engine, signal.SIGCONT)
        before = metrics.read_text().count("\n")
        until(lambda: metrics.read_text().count("\n") > before, "another step")
    finally:
        run.kill()
        run.wait()
        assert run.stdout is not None
        run.stdout.close()
    assert "without a summary" in explain(folder)[0].text


def test_files_of_a_running_run_may_vanish_meanwhile(tmp_path: Path) -> None:
    (tmp_path / "rollouts").mkdir()
    done = threading.Event()

    def write() -> None:
        while not done.is_set():
            for number in range(20):
                (tmp_path / "rollouts" / f".{number}.tmp").touch()
            for number in range(20):
                (tmp_path / "rollouts" / f".{number}.tmp").unlink()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        newest = max(_newest(tmp_path) for _ in range(2000))
    finally:
        done.set()
        writer.join()
    assert abs(newest - time.time()) < 60


def test_a_slow_save_is_not_taken_for_a_wait_for_rollouts(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    seen: list[tuple[str, str]] = []
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    checkpoints.save(1, lambda folder: seen.append(_stage(tmp_path, done=1)), {})
    assert seen == [("a checkpoint is being written", "trainer")]
    assert _stage(tmp_path, done=1) == ("waiting for rollouts", "engine server")


def test_the_roles_of_processes_go_by_modules_that_exist() -> None:
    modules = [word.rstrip(".") for word, _, _ in ROLES if word.startswith(("atropos_exp.", "atroposlib."))]
    assert len(modules) == 6
    assert [module for module in modules if importlib.util.find_spec(module) is None] == []


@pytest.mark.slow
def test_the_estimate_is_near_what_a_run_takes(tmp_path: Path, checked: Callable[..., Any]) -> None:
    """512 sequences of at most 16 tokens in one micro-batch, in fp32."""
    sizes = ("max_prompt_length=8", "max_response_length=8", "trainer.max_tokens_per_micro_batch=8192")
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *SMALL, *sizes, "trainer.max_steps=1", f"output_dir={tmp_path}"],
        env=environment(), capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    peak = int(re.search(r"peak (\d+)", done.stdout)[1]) * 1024  # type: ignore[index]
    needs = memory.estimate(checked(*sizes), memory.Shape.of(WEIGHTS))
    expected = memory.TRAINER_BYTES + needs.trainer_total
    assert 0.75 < peak / expected < 1.25, (memory.human(peak), memory.human(expected), needs.trainer)


def test_the_shape_of_tiny() -> None:
    """By hand from its config.json: embeddings 384 x 128; four layers of attention (128 + 2 x 64 wide queries, keys and
    values with biases, output), feed-forward 3 x 128 x 512, two norms; a last norm. Tied, so no head."""
    layer = 128 * (128 + 64 + 64) + (128 + 64 + 64) + 128 * 128 + 3 * 128 * 512 + 2 * 128
    shape = memory.Shape.of(WEIGHTS)
    assert shape.parameters == 384 * 128 + 4 * layer + 128
    assert (shape.layers, shape.query, shape.key_value) == (4, 128, 64)
    assert memory.activation_width(shape, checkpointing=True) < memory.activation_width(shape, checkpointing=False) / 2
