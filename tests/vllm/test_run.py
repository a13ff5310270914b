"""Whole experiments that sample with real vLLM, most of them through the gateway and the real Atropos."""

from __future__ import annotations

import os
import shutil
import signal
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from atropos_exp.export import export
from atropos_exp.parts.model.smollm2 import converted_folder
from atropos_exp.parts.model.tiny import WEIGHTS
from atropos_exp.types import Rollout
from tests.helpers.background_run import Run, group_ids, journals
from tests.helpers.experiments import metrics, run, run_here, summary
from tests.helpers.random_models import plain_logprobs

pytestmark = pytest.mark.vllm

VLLM = ("engine=vllm", "engine.num_threads=1")
NATS = 0.02  # between two implementations in float32


def assert_proven(folder: Path, found: dict[str, Any], steps: int, *, restarts: int = 0) -> None:
    """Every sync, but for those that the death of the server cut short."""
    assert (found["steps"], found["policy_version"]) == (steps, steps)
    assert found["sync"]["count"] == steps + 1 + restarts
    assert steps + 1 <= found["sync"]["verified"] and found["sync"]["count"] - found["sync"]["verified"] <= restarts
    assert found["sync"]["canary_gap_max"] < 0.002
    rows = metrics(folder)
    assert [row["step"] for row in rows] == list(range(steps + 1))
    assert any((row.get("grad/norm") or 0.0) > 0.0 for row in rows)


def assert_came_through_atropos(folder: Path, found: dict[str, Any], num_groups: int) -> None:
    assert found["rollouts"]["local"] == 0 < found["rollouts"]["atropos"]
    ids = group_ids(folder)
    assert len(ids) == len(set(ids)) == sum(len(journal.groups) for journal in journals(folder)) == num_groups


def by_version(folder: Path) -> dict[int, list[Rollout]]:
    found = defaultdict(list)
    for journal in journals(folder):
        for group in journal.groups:
            for rollout in group.rollouts:
                found[rollout.policy_version].append(rollout)
    return found


def largest_gap(model_folder: Path, rollouts: list[Rollout], temperature: float) -> float:
    """Between the journalled logprobs and those of plain transformers with these weights, in nats."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype="float32", attn_implementation="sdpa")
    gaps = []
    for rollout in rollouts:
        assert rollout.logprobs is not None and not rollout.trained[0]
        expected = plain_logprobs(model, rollout.token_ids, temperature)
        gaps += np.abs(rollout.logprobs[1:] - expected)[rollout.trained[1:]].tolist()
    return max(gaps)


@pytest.mark.timeout(600)
def test_tiny_through_atropos(tmp_path: Path) -> None:
    """What is journalled under a version is what the weights of that version say."""
    folder = tmp_path / "run"
    found = run(
        folder, *VLLM, "rollout=atropos", "trainer.max_steps=6", "checkpoint.every=1", "checkpoint.keep=6", timeout=500
    )
    assert found["status"] == "finished"
    assert "engine: vllm" in found["versions"]  # of an environment of its own
    assert_proven(folder, found, 6)
    assert_came_through_atropos(folder, found, 6 * 4)
    versions = by_version(folder)
    assert len(versions) >= 3
    for version, rollouts in versions.items():
        weights = tmp_path / f"version_{version}"
        if version == 0:
            shutil.copytree(WEIGHTS, weights)
        else:
            export(folder / "checkpoints" / f"step_{version:06d}", weights, "float32")
        assert largest_gap(weights, rollouts, 1.0) < NATS
    assert largest_gap(WEIGHTS, versions[max(versions)], 1.0) > NATS, "the weights of another version say other things"


@pytest.mark.timeout(900)  # the first time, the weights are downloaded and converted
def test_a_real_pretrained_model_through_atropos(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    found = run(
        folder, *VLLM, "model=smollm2_135m", "reward=numeric", "rollout=atropos", "trainer.max_steps=2",
        "data.prepare.arguments={operations: '+', digits: 1, num_train: 60, num_test: 6, seed: 0}",
        "data.system_prompt='What is the sum? Answer with the number only, such as 2+2=4.'",  # right now and then
        "max_prompt_length=64", "max_response_length=12", "group_size=6", "eval.num_prompts=0", "temperature=0.7",
        "trainer.learning_rate=1e-5", timeout=850,
    )  # fmt: skip
    shutil.rmtree(folder / "checkpoints")  # 1.6 GB
    assert found["status"] == "finished"
    assert_proven(folder, found, 2)
    assert_came_through_atropos(folder, found, 2 * 4)
    assert largest_gap(converted_folder(), by_version(folder)[0], 0.7) < NATS


@pytest.mark.timeout(600)
@pytest.mark.parametrize("lora", ["merged", "adapter"])
def test_an_adapter_is_trained(tmp_path: Path, lora: str) -> None:
    folder = tmp_path / "run"
    found = run_here(
        folder, *VLLM, f"engine.lora={lora}", "trainer.max_steps=2", "model.lora.rank=8", "eval.num_prompts=0"
    )
    assert found["status"] == "finished"
    assert_proven(folder, found, 2)
    first, *later = [row["sync/bytes"] for row in metrics(folder)]
    if lora == "merged":
        assert later == [first] * 2
    else:  # the base comes once
        (saved,) = (folder / "checkpoints").rglob("adapter*.safetensors")
        matrices = load_file(saved)
        assert later == [sum(4 * matrix.numel() for matrix in matrices.values())] * 2 and first > 5 * later[0]
    # The trainer under its own attention and vLLM under its kernels, with the same weights: these are local rollouts.
    assert max(row.get("policy/logprob_gap_max") or 0.0 for row in metrics(folder)) < NATS


@pytest.mark.timeout(900)
def test_a_run_through_atropos_survives_the_loss_of_its_engine(tmp_path: Path) -> None:
    """Killed, then stopped: noticed, started anew, synced with the whole proof, and nothing is trained twice."""
    running = Run(
        tmp_path / "run", *VLLM, "rollout=atropos", "trainer.max_steps=1000000", "checkpoint.every=0",
        "eval.num_prompts=0",
    )  # fmt: skip
    try:
        running.wait_until(lambda: len(running.steps("atropos")) >= 2, "two steps", 300)
        for number in (signal.SIGKILL, signal.SIGSTOP):
            lost, before = running.programs()["engine"], len(running.steps("atropos"))
            os.kill(lost, number)
            running.wait_until(
                lambda lost=lost: running.programs().get("engine", lost) != lost, f"a new engine after {number!r}", 120
            )
            running.wait_until(
                lambda before=before: len(running.steps("atropos")) >= before + 3, f"steps after {number!r}", 200
            )
        running.process.send_signal(signal.SIGTERM)
        running.wait(120)
    finally:
        running.stop()
    found = summary(running.folder)
    assert found["status"] == "stopped"
    assert_proven(running.folder, found, found["steps"], restarts=2)
    assert_came_through_atropos(running.folder, found, found["steps"] * 4)
    assert "engine lost, restart 2 of 2" in running.output
    assert (running.folder / "log" / "engine.log").read_text().count("serving ") == 3
