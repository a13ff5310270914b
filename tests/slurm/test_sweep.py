"""A sweep of six runs as an array, in which one fails, some are preempted and a node dies; then only the rest again."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from experiments import summary
from slurm_cluster import ON_SLURM, ROOT, Cluster, ends, last_step, output

NUM_STEPS = 30


def jobs_of(sweep: Path) -> dict[int, str]:
    rows = [json.loads(line) for line in (sweep / "slurm" / "jobs.jsonl").read_text().splitlines()]
    return {row["number"]: row["job_id"] for row in rows}


def test_six_runs_and_what_is_left_of_them(cluster: Cluster, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    words = [
        *ON_SLURM, "cluster.partition=low", "cluster.array_parallelism=2", "cluster.signal_seconds=150",
        "cluster.max_failures=2", "advantage=grpo,rloo", "seed=0,1,2", f"trainer.max_steps={NUM_STEPS}",
        "checkpoint.every=5", "eval.num_prompts=0", f"output_dir={tmp_path / 'out'}", f"sweep.dir={sweep}",
        "sweep.wait=false",
    ]  # fmt: skip
    begun = time.monotonic()
    typo = cluster.type(*words, "trainer.max_stepz=3", flags=("-m",))
    assert typo.returncode == 2 and "max_steps" in typo.stderr and cluster.output("squeue", "-h") == ""
    first = cluster.type(*words, "cluster.sbatch=['--begin=now+8']", flags=("-m",))
    assert first.returncode == 0, first.stdout + first.stderr
    assert "6 runs queued" in first.stdout and time.monotonic() - begun < 120
    (sweep / "003" / "rollouts" / "step_000004.parquet").mkdir(parents=True)  # run 3 cannot go on at its fourth step
    number = jobs_of(sweep)[0].split("_")[0]
    assert jobs_of(sweep) == {index: f"{number}_{index}" for index in range(6)}

    cluster.wait_until(lambda: last_step(sweep / "000") >= 3, 300)
    cluster.preempt(jobs_of(sweep)[0])
    victims: list[Path] = []

    def somebody_trains() -> bool:
        victims[:] = [
            sweep / f"{run:03d}"
            for run in (0, 1, 2, 4, 5)
            if (ends(sweep / f"{run:03d}") or ["none yet"])[-1] is None and last_step(sweep / f"{run:03d}") >= 1
        ]
        return bool(victims)

    cluster.wait_until(somebody_trains, 600)
    victim = victims[0]
    rows = [json.loads(line) for line in (victim / "slurm" / "attempts.jsonl").read_text().splitlines()]
    cluster.kill_node([row for row in rows if row["event"] == "start"][-1]["nodes"][0])
    cluster.wait_until(lambda: "down" in cluster.output("sinfo", "-h", "-o", "%T"), 120)
    cluster.up()

    def status() -> dict[str, str]:
        command = [sys.executable, "-m", "atropos_exp.sweep", "status", str(sweep)]
        done = subprocess.run(
            command, env=cluster.environment, capture_output=True, text=True, timeout=120, cwd=ROOT, check=False
        )
        return {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()[:3].isdigit()}

    ids = list(jobs_of(sweep).values())
    assert cluster.wait_for_end(*ids, seconds=900) == ["COMPLETED"] * 3 + ["FAILED"] + ["COMPLETED"] * 2, status()
    assert ends(sweep / "003") == ["failed", "gave_up"] and summary(sweep / "003")["steps"] == 3
    assert "requeued" in ends(sweep / "000") and None in ends(victim), output(victim)
    assert all(summary(sweep / f"{run:03d}")["status"] == "finished" for run in (0, 1, 2, 4, 5))
    table = status()
    assert "failed" in table["003"] and sum("finished" in line for line in table.values()) == 5

    (sweep / "003" / "rollouts" / "step_000004.parquet").rmdir()
    again = cluster.type(*words, flags=("-m",))
    assert again.returncode == 0 and "1 runs queued" in again.stdout, again.stdout + again.stderr
    left = jobs_of(sweep)[3]
    assert "_" not in left and set(jobs_of(sweep).values()) - {left} == set(ids) - {f"{number}_3"}
    assert cluster.wait_for_end(left, seconds=200) == ["COMPLETED"]
    nothing = cluster.type(*words, flags=("-m",))
    assert nothing.returncode == 0 and "Nothing is left to do" in nothing.stdout
