"""Whole experiments that sample with real vLLM."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from experiments import command, environment, metrics, run_here, summary

pytestmark = pytest.mark.vllm

VLLM = ("engine=vllm", "engine.num_threads=1")


def assert_proven(folder: Path, found: dict[str, Any], steps: int) -> None:
    assert (found["status"], found["steps"], found["policy_version"]) == ("finished", steps, steps)
    assert found["sync"]["count"] == found["sync"]["verified"] == steps + 1
    assert found["sync"]["canary_gap_max"] < 0.002
    rows = metrics(folder)
    assert any((row.get("grad/norm") or 0.0) > 0.0 for row in rows)
    # The trainer under its own attention and vLLM under its kernels, both in float32.
    assert max(row.get("policy/logprob_gap_max") or 0.0 for row in rows) < 0.02


@pytest.mark.timeout(600)
@pytest.mark.parametrize("overrides", [["trainer.max_steps=4"], ["trainer.max_steps=2", "model.lora.rank=8"]], ids=str)
def test_it_trains(overrides: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    found = run_here(folder, *VLLM, *overrides)
    assert_proven(folder, found, int(overrides[0].split("=")[1]))


@pytest.mark.timeout(600)
def test_greedy_answers_are_those_of_engine_hf(tmp_path: Path) -> None:
    """Held-out answers at temperature 0 of the same weights, by two engines."""
    accuracy = {}
    for option, more in (("hf", ()), ("vllm", VLLM)):
        folder = tmp_path / option
        run_here(folder, *more, "trainer.max_steps=1", "eval.num_prompts=64", "eval.samples_per_prompt=0")
        accuracy[option] = metrics(folder)[0]["eval/arithmetic/accuracy"]
    assert accuracy["hf"] == accuracy["vllm"] > 0


@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["kill", "stop"])
def test_a_run_survives_the_loss_of_its_engine(number: int, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with (tmp_path / "output.log").open("w") as output:
        process = subprocess.Popen(
            command(folder, *VLLM, "trainer.max_steps=24", "checkpoint.every=0"),
            env=environment(), stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 300
        while not (folder / "metrics.jsonl").exists() or len(metrics(folder)) < 3:
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "output.log").read_text()[-3000:]
            time.sleep(0.02)
        os.kill(_engine_of(process.pid), number)
        assert process.wait(timeout=400) == 0, (tmp_path / "output.log").read_text()[-3000:]
    finally:
        process.kill()
        process.wait()
    found = summary(folder)
    assert (found["status"], found["steps"]) == ("finished", 24)
    assert [row["step"] for row in metrics(folder)] == list(range(25))
    assert "engine lost, restart 1 of 2" in (tmp_path / "output.log").read_text()
    assert (folder / "log" / "engine.log").read_text().count("serving ") == 2


def _engine_of(pid: int) -> int:
    """The vLLM server among the descendants of a run."""
    todo = [pid]
    while todo:
        for task in Path(f"/proc/{todo.pop()}/task").iterdir():
            children = [int(child) for child in (task / "children").read_text().split()]
            for child in children:
                if "atropos_exp.engine.vllm_server" in Path(f"/proc/{child}/cmdline").read_text().split("\0")[:4]:
                    return child
            todo += children
    raise AssertionError("no vLLM server runs")
