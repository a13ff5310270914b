"""Runs through the real Atropos API with the real environment process; its parts killed one after the other."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.helpers.background_run import PROGRAMS, Run, group_ids
from tests.helpers.experiments import metrics, summary
from tests.helpers.processes import command_line, descendants, is_alive

QUIET = ("eval.num_prompts=0", "checkpoint.every=0", "sync.canary_prompts=1")
START_SECONDS = 150.0


@pytest.fixture
def start(tmp_path: Path):
    runs: list[Run] = []

    def begin(*overrides: str) -> Run:
        runs.append(Run(tmp_path / f"run{len(runs)}" / "run", *QUIET, *overrides))
        return runs[-1]

    for number in range(3):
        (tmp_path / f"run{number}").mkdir()
    yield begin
    for run in runs:
        run.stop()


@pytest.mark.timeout(400)
def test_a_run_through_atropos(start) -> None:
    """Every rollout comes from the environment, through the gateway; nothing is trained twice, nothing is left."""
    run = start("rollout=atropos", "trainer.max_steps=3")
    run.wait_until(lambda: run.steps("atropos"), "a step through Atropos", START_SECONDS)
    family = descendants(run.process.pid)
    assert run.wait(200) == 0, run.output[-3000:]
    found = summary(run.folder)
    assert (found["status"], found["steps"], found["rollouts"]["local"]) == ("finished", 3, 0)
    assert found["rollouts"]["atropos"] == 3 * 16
    assert found["sync"]["count"] == found["sync"]["verified"] == 4
    fresh = [row for row in metrics(run.folder)[1:] if row["policy/version_lag_max"] == 0]
    assert all(row["policy/logprob_gap_max"] < 1e-4 for row in fresh), "the weights that sampled are the trainer's"
    ids = group_ids(run.folder)
    assert len(ids) == len(set(ids)) == 3 * 4
    wait_for_end(family)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_run_through_atropos_and_the_death_of_each_of_its_parts(start) -> None:
    """Gateway, environment, engine and API are killed at random moments and the run recovers; an engine that dies more
    often than it may ends it."""
    run = start("rollout=auto", "atropos.timeout=4", "engine.max_restarts=1", "trainer.max_steps=1000000")
    run.wait_until(lambda: len(run.steps("atropos")) >= 3, "three steps through Atropos", START_SECONDS)
    assert run.steps("local") == []
    moments = random.Random(3)

    for part in ("gateway", "environment", "engine", "gateway", "environment"):
        time.sleep(moments.uniform(0.0, 1.5))
        before = len(run.steps("atropos"))
        victim = run.programs()[part]
        os.kill(victim, signal.SIGKILL)
        run.wait_until(lambda part=part, victim=victim: run.programs().get(part, victim) != victim, f"new {part}", 60)
        run.wait_until(lambda before=before: len(run.steps("atropos")) >= before + 3, f"steps after the {part}", 90)

    time.sleep(moments.uniform(0.0, 1.5))
    os.kill(run.programs()["api"], signal.SIGKILL)
    run.wait_until(lambda: run.steps("local"), "the run goes on locally", 60)
    fallback = run.steps("local")[0]
    run.wait_until(lambda: max(run.steps("atropos")) > fallback, "it returns to Atropos", 120)

    os.kill(run.programs()["engine"], signal.SIGKILL)
    assert run.wait(60) == 1
    found = summary(run.folder)
    assert found["status"] == "failed"
    assert "engine hf" in found["error"]
    assert found["rollouts"]["atropos"] == 16 * len(run.steps("atropos"))
    assert found["rollouts"]["local"] == 16 * len(run.steps("local"))
    ids = group_ids(run.folder)
    assert len(ids) == len(set(ids)), "no group twice"
    journaled = len(ids) // 4
    assert journaled - len(run.steps("atropos")) in (0, 1), "a step may be on disk that the engine's death cut short"
    assert run.output.count("going on with local ones") == 1
    assert run.output.count("Atropos delivers again") == 1


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_two_ranks_killed_in_the_middle_go_on_and_leave_nothing(start) -> None:
    """kill -9 of a two-rank run takes everything with it; the same command then finishes it, nothing trained twice."""
    overrides = ("rollout=atropos", "trainer.max_steps=6", "cluster.num_processes=2")
    run = start(*overrides)
    run.wait_until(lambda: len(run.steps("atropos")) >= 2, "two steps", START_SECONDS)
    programs = set(PROGRAMS.values())
    assert set(run.programs()) == programs
    family = descendants(run.process.pid)
    assert len(family) >= 10, "two ranks, four programs and their guards"
    for pid in (run.process.pid, *(pid for pid in family if "atropos_exp.run" in command_line(pid))):
        os.kill(pid, signal.SIGKILL)
    run.process.wait(30)
    wait_for_end(family)

    again = Run(run.folder, *QUIET, *overrides)
    try:
        again.wait_until(
            lambda: set(PROGRAMS.values()) <= set(again.programs()), "all programs are there", START_SECONDS
        )
        family = descendants(again.process.pid)
        assert again.wait(200) == 0, again.output[-3000:]
    finally:
        again.stop()
    found = summary(run.folder)
    assert (found["status"], found["rollouts"]["local"], found["rollouts"]["dropped"]) == ("finished", 0, {})
    rows = metrics(run.folder)
    assert [row["step"] for row in rows] == list(range(7))
    assert found["rollouts"]["atropos"] == 6 * 16
    ids = group_ids(run.folder)
    assert len(ids) == len(set(ids)) == 6 * 4, "each group once, over both attempts"
    wait_for_end(family)


def wait_for_end(family: list[int]) -> None:
    deadline = time.monotonic() + 15
    while any(is_alive(pid) for pid in family) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [command_line(pid) for pid in family if is_alive(pid)] == []
