"""Time limits, failing nodes and processes, crash loops and cancelled jobs."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

from atropos_exp.parts.cluster.slurm.attempts import Attempt, read_attempts
from tests.helpers.experiments import metrics, summary
from tests.slurm.slurm_cluster import Cluster, assert_same, ends, last_step, output, rank_pid

NUM_STEPS = 60
RUN = (f"trainer.max_steps={NUM_STEPS}", "checkpoint.every=6", "eval.num_prompts=0")


def test_a_time_limit(cluster: Cluster, tmp_path: Path) -> None:
    """Slurm's own signal, 75 to 105 s after the start of an attempt of 2 minutes. The run would take much longer."""
    folder, hopeless = (tmp_path / name / "run" for name in ("long", "hopeless"))
    endless = ("trainer.max_steps=5000", *RUN[1:])
    job = cluster.submit(folder, "cluster.time_minutes=2", "cluster.signal_seconds=15", *endless)
    short = cluster.submit(
        hopeless, "cluster.time_minutes=1", "cluster.signal_seconds=50", "cluster.max_failures=1", *RUN
    )
    cluster.wait_until(lambda: ends(hopeless), 60)
    cluster.output("scancel", "--signal=USR2", short)  # it comes before the first step
    cluster.wait_until(lambda: len(ends(folder)) == 2, 200)
    first = read_attempts(folder)[0]
    assert (first.how, first.signals) == ("requeued", ("SIGUSR2",)), output(folder)
    assert summary(folder)["status"] == "stopped"
    cluster.wait_until(lambda: last_step(folder) > (first.end_step or 0), 180)
    assert [row["step"] for row in metrics(folder)] == list(range(last_step(folder) + 1))
    cluster.output("scancel", job)
    assert cluster.wait_for_end(short, job) == ["FAILED", "CANCELLED"], output(hopeless)
    assert read_attempts(hopeless)[-1].reason == "the time limit came before a new step; raise time_minutes"


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
    os.kill(rank_pid(killed), signal.SIGKILL)
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
