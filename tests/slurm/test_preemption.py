"""Preempted at random moments, the run continues in its folder and ends with the bits of an undisturbed one."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from atropos_exp.parts.cluster.slurm.attempts import read_attempts
from tests.helpers.experiments import summary
from tests.slurm.slurm_cluster import Cluster, assert_same, ends, last_step, output

NUM_PREEMPTIONS = 6
NUM_STEPS = 80
RUN = (f"trainer.max_steps={NUM_STEPS}", "checkpoint.every=6", "eval.num_prompts=0")


@pytest.fixture
def terminating(tmp_path: Path) -> Iterator[Cluster]:
    """A cluster that preempts with SIGTERM only."""
    found = Cluster(Path(tempfile.mkdtemp(prefix="slurm-")), SLURM_CTLD_PARAMS="", SLURM_NODES="4")
    try:
        yield found
    finally:
        found.wipe()


def test_six_preemptions_change_nothing(cluster: Cluster, tmp_path: Path, undisturbed: Path) -> None:
    folder = tmp_path / "out" / "run"
    job = cluster.submit(folder, "cluster.partition=low", "cluster.signal_seconds=150", *RUN)
    moments = random.Random(3)
    for number in range(NUM_PREEMPTIONS):
        begun = number + 1
        cluster.wait_until(lambda begun=begun: len(read_attempts(folder)) == begun, 180)
        reached = last_step(folder)
        if number % 3:  # while it trains; otherwise at some moment of its start
            goal = reached + moments.choice((1, 2, 5))
            cluster.wait_until(lambda goal=goal: last_step(folder) >= goal, 180)
        else:
            cluster.pause(moments.uniform(0.0, 8.0))
        cluster.preempt(job)
        assert last_step(folder) < NUM_STEPS, "the preemptions must come before the end"
        assert read_attempts(folder)[-1].signals == ("SIGUSR2",), output(folder)
        # It was the run itself that ended, with everything it needs for that alive.
        assert summary(folder)["status"] == "stopped", output(folder)
    assert cluster.wait_for_end(job, seconds=300) == ["COMPLETED"], output(folder)
    assert ends(folder) == ["requeued"] * NUM_PREEMPTIONS + ["finished"]
    assert summary(folder)["status"] == "finished"
    assert_same(folder, undisturbed)


def test_a_cluster_that_only_terminates(terminating: Cluster, tmp_path: Path, undisturbed: Path) -> None:
    folder = tmp_path / "out" / "run"
    job = terminating.submit(folder, "cluster.partition=low", "cluster.signal_seconds=150", *RUN)
    for begun in (1, 2):
        terminating.wait_until(lambda begun=begun: len(read_attempts(folder)) == begun, 180)
        goal = last_step(folder) + 4
        terminating.wait_until(lambda goal=goal: last_step(folder) >= goal, 180)
        terminating.preempt(job)
        assert read_attempts(folder)[-1].signals == ("SIGTERM",), output(folder)
        assert summary(folder)["status"] == "stopped", output(folder)
    assert terminating.wait_for_end(job, seconds=300) == ["COMPLETED"], output(folder)
    assert ends(folder) == ["requeued", "requeued", "finished"]
    assert_same(folder, undisturbed)
