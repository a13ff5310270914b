"""A sweep of six runs as an array: one fails, one is preempted, one's node dies, one hits its time limit. Then only
what is left, again; and the report, against what scipy and Slurm's accounting say."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np

from atropos_exp.parts.cluster.slurm.attempts import read_attempts
from tests.helpers.experiments import final_state, metrics, run, summary
from tests.helpers.page_text import Text, expected_comparison
from tests.slurm.slurm_cluster import ON_SLURM, ROOT, Cluster, ends, last_step, output, rank_pid

NUM_STEPS = 30
NUM_PROMPTS = 16
FAILS, LATE = 3, 5
EVAL = (f"eval.num_prompts={NUM_PROMPTS}", "eval.samples_per_prompt=0")
POINTS = [(advantage, seed) for advantage in ("grpo", "rloo") for seed in (0, 1, 2)]


def jobs_of(sweep: Path) -> dict[int, str]:
    rows = [json.loads(line) for line in (sweep / "slurm" / "jobs.jsonl").read_text().splitlines()]
    return {row["number"]: row["job_id"] for row in rows}


def test_six_runs_and_what_is_left_of_them(cluster: Cluster, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    words = [
        *ON_SLURM, "cluster.partition=low", "cluster.array_parallelism=2", "cluster.signal_seconds=150",
        "cluster.max_failures=2", "advantage=grpo,rloo", "seed=0,1,2", f"trainer.max_steps={NUM_STEPS}",
        "checkpoint.every=5", *EVAL, f"output_dir={tmp_path / 'out'}", f"sweep.dir={sweep}", "sweep.wait=false",
    ]  # fmt: skip
    folders = [sweep / f"{number:03d}" for number in range(6)]
    cluster.wait_until_empty()
    typo = cluster.type(*words, "trainer.max_stepz=3", flags=("-m",))
    assert typo.returncode == 2 and "max_steps" in typo.stderr and cluster.output("squeue", "-h") == ""
    first = cluster.type(*words, "cluster.sbatch=['--begin=now+8']", flags=("-m",))
    assert first.returncode == 0, first.stdout + first.stderr
    assert "6 runs queued" in first.stdout
    obstacle = folders[FAILS] / "rollouts" / "step_000004.parquet"  # where the journal of its fourth step has to go
    obstacle.mkdir(parents=True)
    jobs = jobs_of(sweep)
    number = jobs[0].split("_")[0]
    assert jobs == {index: f"{number}_{index}" for index in range(6)}

    # One is preempted, and with it the one that runs beside it.
    cluster.wait_until(lambda: last_step(folders[0]) >= 3, 300)
    cluster.preempt(jobs[0])

    # One loses its node.
    victims: list[Path] = []

    def somebody_trains() -> bool:
        victims[:] = [
            folders[at] for at in (0, 1, 2, 4)
            if _runs_undisturbed(folders[at]) and 1 <= last_step(folders[at]) < NUM_STEPS - 5
        ]  # fmt: skip
        return bool(victims)

    cluster.wait_until(somebody_trains, 600)
    victim = victims[0]
    rows = [json.loads(line) for line in (victim / "slurm" / "attempts.jsonl").read_text().splitlines()]
    cluster.kill_node([row for row in rows if row["event"] == "start"][-1]["nodes"][0])
    cluster.wait_until(lambda: "down" in cluster.output("sinfo", "-h", "-o", "%T"), 120)
    cluster.up()

    # One hits its time limit. It stands still, so as not to end before that; Slurm wakes whom it signals.
    cluster.wait_until(lambda: last_step(folders[LATE]) >= 2 and _runs_undisturbed(folders[LATE]), 600)
    os.kill(rank_pid(folders[LATE]), signal.SIGSTOP)
    cluster.limit(jobs[LATE], minutes_from_now=2)  # the warning is due at once
    cluster.wait_until(lambda: "requeued" in ends(folders[LATE]), 180)
    cluster.limit(jobs[LATE], minutes_from_now=20)

    ended = cluster.wait_for_end(*jobs.values(), seconds=900)
    assert ended == ["FAILED" if at == FAILS else "COMPLETED" for at in range(6)], _sweep(cluster, "status", sweep)
    assert ends(folders[FAILS])[-1] == "gave_up" and summary(folders[FAILS])["steps"] == 3
    assert "requeued" in ends(folders[0]) and None in ends(victim), output(victim)
    assert ends(folders[LATE])[-2:] == ["requeued", "finished"], output(folders[LATE])
    assert read_attempts(folders[LATE])[-2].signals == ("SIGUSR2",)
    finished = [folder for at, folder in enumerate(folders) if at != FAILS]
    assert all(summary(folder)["status"] == "finished" for folder in finished)
    for folder in finished:
        assert ends(folder).count("finished") == 1, "queueing one again starts no other"
        assert [row["step"] for row in metrics(folder)] == list(range(NUM_STEPS + 1)), folder
    lines = _sweep(cluster, "status", sweep).splitlines()
    table = {line.split()[0]: line for line in lines if line.strip()[:3].isdigit()}
    assert "failed" in table["003"] and sum("finished" in line for line in table.values()) == 5
    page = _report(cluster, sweep)
    assert "1 of 6 runs are not finished; means are over those that are." in page.text
    assert "Runs that did not finish" in page.text and "rank 0 failed with exit code 1 (failure 2" in page.text
    assert "003/log/rank_0.log" in page.text and (folders[FAILS] / "log" / "rank_0.log").exists()

    # The same command does what is left, and only that.
    obstacle.rmdir()
    before = [(folder / "summary.json").stat().st_mtime_ns for folder in finished]
    again = cluster.type(*words, flags=("-m",))
    assert again.returncode == 0 and "1 runs queued" in again.stdout, again.stdout + again.stderr
    left = jobs_of(sweep)[FAILS]
    assert "_" not in left and {**jobs_of(sweep), FAILS: jobs[FAILS]} == jobs
    assert cluster.wait_for_end(left, seconds=300) == ["COMPLETED"], output(folders[FAILS])
    assert [(folder / "summary.json").stat().st_mtime_ns for folder in finished] == before
    nothing = cluster.type(*words, flags=("-m",))
    assert nothing.returncode == 0 and "Nothing is left to do" in nothing.stdout

    _check_report(_report(cluster, sweep), folders, cluster.seconds_of(number, left))
    # The one that was preempted, against the same run without Slurm.
    undisturbed = tmp_path / "undisturbed" / "run"
    run(undisturbed, *EVAL, "seed=0", f"trainer.max_steps={NUM_STEPS}", timeout=400)
    assert final_state(folders[0]) == final_state(undisturbed)


def _runs_undisturbed(folder: Path) -> bool:
    """The run has an attempt that goes on, as far as it knows."""
    attempts = read_attempts(folder)
    return bool(attempts) and attempts[-1].how is None and not attempts[-1].signals


def _check_report(page: Text, folders: list[Path], seconds: float) -> None:
    """`seconds`: that the jobs ran, by Slurm's accounting."""
    finals = {point: metrics(folders[at])[-1]["eval/arithmetic/accuracy"] for at, point in enumerate(POINTS)}
    base, other = (np.array([finals[name, seed] for seed in (0, 1, 2)]) for name in ("grpo", "rloo"))
    rows, p = expected_comparison(base, other, prompts=NUM_PROMPTS)
    for row in rows:
        assert row in page.text, (row, page.text)
    assert ("No significant difference between" in page.text) == (p >= 0.05)
    rewards = [np.mean([metrics(folder)[step]["reward/mean"] for folder in folders[3:]]) for step in (1, NUM_STEPS)]
    curve = page.data["runs"][1]["values"]["reward/mean"]
    assert np.allclose([curve[1], curve[-1]], rewards)
    tokens = sum(row.get("rollout/num_tokens") or 0 for folder in folders for row in metrics(folder))
    assert f"{tokens:,.0f}" in page.text
    found = re.search(r"All ([0-9.e-]+) [\d,]+", page.text)
    assert found is not None
    hours = float(found[1])
    # Slurm counts more: its own start and end of every attempt, and a dead node's time until it was noticed.
    assert 0.4 * seconds / 3600 < hours < 1.02 * seconds / 3600, (hours, seconds / 3600)


def _report(cluster: Cluster, sweep: Path) -> Text:
    _sweep(cluster, "report", sweep)
    return Text((sweep / "report.html").read_text())


def _sweep(cluster: Cluster, command: str, sweep: Path) -> str:
    """`python -m atropos_exp.sweep COMMAND DIR`; what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "atropos_exp.sweep", command, str(sweep)],
        env=cluster.environment, capture_output=True, text=True, timeout=200, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
