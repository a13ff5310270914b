"""Preemption, time limits, failing nodes and processes: the run continues in its folder and ends with the same bits."""

from __future__ import annotations

import json
import os
import random
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from experiments import final_state, metrics, run, summary
from slurm_cluster import Cluster, output

from atropos_exp.cluster.slurm_attempts import Attempt, read_attempts

NUM_PREEMPTIONS = 10
NUM_STEPS = 100
RUN = (f"trainer.max_steps={NUM_STEPS}", "checkpoint.every=6", "eval.num_prompts=0")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    run(folder, *RUN, timeout=400)
    return folder


@pytest.fixture
def terminating(tmp_path: Path) -> Iterator[Cluster]:
    """A cluster that preempts with SIGTERM only."""
    found = Cluster(Path(tempfile.mkdtemp(prefix="slurm-")), SLURM_CTLD_PARAMS="", SLURM_NODES="4")
    try:
        yield found
    finally:
        found.wipe()


def last_step(folder: Path) -> int:
    try:
        return int(metrics(folder)[-1]["step"])
    except (OSError, ValueError, IndexError):
        return -1


def assert_same(folder: Path, undisturbed: Path) -> None:
    assert [row["step"] for row in metrics(folder)] == list(range(NUM_STEPS + 1)), "no step lost, none twice"
    assert final_state(folder) == final_state(undisturbed)
    for name in ("reward/mean", "loss/policy", "grad/norm"):
        assert [row.get(name) for row in metrics(folder)] == [row.get(name) for row in metrics(undisturbed)]


def ends(folder: Path) -> list[str | None]:
    return [attempt.how for attempt in read_attempts(folder)]


def test_ten_preemptions_change_nothing(cluster: Cluster, tmp_path: Path, undisturbed: Path) -> None:
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
        # It was the run itself that ended, with everything it needs for that alive: nothing was killed.
        assert summary(folder)["status"] == "stopped", output(folder)
        assert "killed" not in output(folder)
    assert cluster.wait_for_end(job, seconds=300) == ["COMPLETED"], output(folder)
    assert ends(folder) == ["requeued"] * NUM_PREEMPTIONS + ["finished"]
    assert summary(folder)["status"] == "finished"
    assert_same(folder, undisturbed)


def test_a_cluster_that_only_terminates(terminating: Cluster, tmp_path: Path, undisturbed: Path) -> None:
    folder = tmp_path / "out" / "run"
    job = terminating.submit(folder, "cluster.partition=low", "cluster.signal_seconds=150", *RUN)
    for goal in (4, 9):
        terminating.wait_until(lambda goal=goal: last_step(folder) >= goal, 180)
        terminating.preempt(job)
        assert read_attempts(folder)[-1].signals == ("SIGTERM",), output(folder)
        assert summary(folder)["status"] == "stopped", output(folder)
    assert terminating.wait_for_end(job, seconds=300) == ["COMPLETED"], output(folder)
    assert ends(folder) == ["requeued", "requeued", "finished"]
    assert_same(folder, undisturbed)


def test_a_time_limit(cluster: Cluster, tmp_path: Path, undisturbed: Path) -> None:
    """The signal comes 75 to 105 s after the start; the run is to take longer, on whatever machine this is."""
    seconds = [row["time/step_s"] for row in metrics(undisturbed) if row["step"] > 1]
    num_steps = min(600, max(60, int(110 / (sum(seconds) / len(seconds)))))
    folder = tmp_path / "out" / "run"
    limit = ("cluster.time_minutes=2", "cluster.signal_seconds=15", f"trainer.max_steps={num_steps}")
    job = cluster.submit(folder, *RUN[1:], *limit)
    assert cluster.wait_for_end(job, seconds=800) == ["COMPLETED"], output(folder)
    assert len(ends(folder)) >= 2 and ends(folder)[:-1] == ["requeued"] * (len(ends(folder)) - 1), output(folder)
    assert {attempt.signals for attempt in read_attempts(folder)[:-1]} == {("SIGUSR2",)}
    assert summary(folder)["status"] == "finished"
    assert [row["step"] for row in metrics(folder)] == list(range(num_steps + 1))


def test_node_failure_and_a_killed_rank(cluster: Cluster, tmp_path: Path, undisturbed: Path) -> None:
    """Two runs at the same time, each with its own misfortune."""
    homeless, killed = (tmp_path / name / "run" for name in ("homeless", "killed"))
    jobs = [
        cluster.submit(homeless, "cluster.sbatch=['--exclude=node1']", *RUN),
        cluster.submit(killed, "cluster.sbatch=['--nodelist=node1']", *RUN),
    ]
    cluster.wait_until(lambda: last_step(homeless) >= 3, 240)
    node = json.loads((homeless / "slurm" / "attempts.jsonl").read_text().splitlines()[0])["nodes"][0]
    cluster.kill_node(node)
    cluster.wait_until(lambda: last_step(killed) >= 3, 240)
    os.kill(int((killed / "lock").read_text().split()[1]), signal.SIGKILL)
    cluster.wait_until(lambda: len(read_attempts(homeless)) == 2, 240)
    cluster.up()
    assert cluster.wait_for_end(*jobs, seconds=600) == ["COMPLETED"] * 2, output(homeless) + output(killed)
    assert ends(homeless) == [None, "finished"]
    assert ends(killed) == ["failed", "finished"]
    assert read_attempts(killed)[0].reason == "rank 0 was killed by SIGKILL"
    for folder in (homeless, killed):
        assert_same(folder, undisturbed)


def test_a_crash_loop_ends_as_failed_and_a_cancelled_job_stays_so(cluster: Cluster, tmp_path: Path) -> None:
    crashing, cancelled, unwanted = (tmp_path / name / "run" for name in ("crashing", "cancelled", "unwanted"))
    (crashing / "rollouts" / "step_000003.parquet").mkdir(parents=True)  # where the journal of step 3 has to go
    jobs = [
        cluster.submit(crashing, "cluster.sbatch=['--nodelist=node1']", *RUN),
        cluster.submit(cancelled, "cluster.sbatch=['--nodelist=node2']", *RUN),
        cluster.submit(unwanted, "cluster.sbatch=['--nodelist=node2']", "cluster.requeue=false", *RUN),
    ]
    cluster.wait_until(lambda: min(last_step(cancelled), last_step(unwanted)) >= 2, 240)
    cluster.output("scancel", jobs[1])
    cluster.output("scancel", "--signal=USR2", jobs[2])
    assert cluster.wait_for_end(*jobs, seconds=400) == ["FAILED", "CANCELLED", "FAILED"], output(crashing)
    assert ends(crashing) == ["failed", "failed", "gave_up"]
    last: Attempt = read_attempts(crashing)[-1]
    assert last.reason == "rank 0 failed with exit code 1 (failure 3 at this step)" and last.end_step == 2
    assert ends(unwanted) == ["stopped"] and summary(unwanted)["status"] == "stopped"
    assert ends(cancelled) in (["stopped"], [None]) and last_step(cancelled) < NUM_STEPS
    # The same command continues, and says why it failed if it is followed; what was in the way is gone.
    (crashing / "rollouts" / "step_000003.parquet").rmdir()
    job = cluster.submit(crashing, *RUN)
    assert job != jobs[0]
    assert cluster.wait_for_end(job, seconds=200) == ["COMPLETED"], output(crashing)
    assert ends(crashing)[3:] == ["finished"] and summary(crashing)["status"] == "finished"
