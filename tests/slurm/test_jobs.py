"""Many runs as one job array, their states with and without accounting, and configurations that stay as they were."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir

from atropos_exp.config.build import build
from atropos_exp.config.freeze import freeze_config
from atropos_exp.config.origin import CONF_DIR
from atropos_exp.parts.cluster.slurm.attempts import read_attempts
from atropos_exp.parts.cluster.slurm.jobs import JobSpec, JobState, cancel, states, submit
from tests.helpers.experiments import SMALL, summary
from tests.slurm.slurm_cluster import Cluster, output


@pytest.fixture
def here(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """This process talks to the cluster itself."""
    for name in ("SLURM_CONF", "PYTHONPATH", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, cluster.environment[name])
    yield cluster


def settings(**changes: Any) -> Any:
    plain = yaml.safe_load((CONF_DIR / "cluster" / "slurm.yaml").read_text())
    return build({**plain, "cpus_per_task": 1, "time_minutes": 10, **changes}, "cluster")


def program(folder: Path, name: str, code: str) -> JobSpec:
    (folder / name).mkdir(parents=True)
    return JobSpec(name=name, arguments=("-c", code), run_folder=folder / name, environment={"MARK": name})


def test_an_array_with_a_failure(here: Cluster, tmp_path: Path) -> None:
    """Two real runs, one of which cannot go on at its second step, and two programs; two at a time."""
    runs = []
    for name in ("good", "bad"):
        run_dir = tmp_path / name
        overrides = [*SMALL, "trainer.max_steps=2", "eval.num_prompts=0", f"output_dir={tmp_path}"]
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF_DIR)):
            config = compose("config", overrides=overrides)
        arguments = freeze_config(config, run_dir / "slurm" / "config.yaml", run_dir=run_dir)
        runs.append(JobSpec(name=name, arguments=arguments, run_folder=run_dir))
    (tmp_path / "bad" / "rollouts" / "step_000002.parquet").mkdir(parents=True)
    show = "import os, time; print(os.environ['MARK']); time.sleep(3)"
    jobs = [*runs, program(tmp_path, "third", show), program(tmp_path, "fourth", show + "; raise SystemExit(5)")]
    before = len(os.listdir(tmp_path))
    ids = submit(jobs, settings(array_parallelism=2, max_failures=1), folder=tmp_path / "slurm", name="sweep")
    assert len(os.listdir(tmp_path)) == before + 1
    number = ids[0].partition("_")[0]
    assert ids == [f"{number}_{index}" for index in range(4)]
    assert all(state.is_active for state in states(ids).values())
    most = 0

    def over() -> bool:
        nonlocal most
        found = states(ids)
        most = max(most, sum(state.state in ("RUNNING", "COMPLETING") for state in found.values()))
        return not any(state.is_active for state in found.values())

    here.wait_until(over, 300)
    assert most == 2
    here.wait_until(lambda: len(here.output("sacct", "-X", "-n", "-j", number).splitlines()) == 4, 30)
    found = states(ids)
    assert [found[job_id].state for job_id in ids] == ["COMPLETED", "FAILED", "COMPLETED", "FAILED"], output(
        runs[0].run_folder
    )
    assert summary(tmp_path / "good")["status"] == "finished"
    assert summary(tmp_path / "bad")["status"] == "failed" and summary(tmp_path / "bad")["steps"] == 1
    assert [read_attempts(tmp_path / name)[-1].how for name in ("good", "bad", "third", "fourth")] == [
        "finished", "gave_up", "finished", "gave_up",
    ]  # fmt: skip
    assert read_attempts(tmp_path / "fourth")[-1].reason == "rank 0 failed with exit code 5"
    assert (tmp_path / "third" / "log" / "rank_0.log").read_text() == "third\n"


def test_cancel_and_states_without_accounting(here: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wait = "import time; time.sleep(100)"
    jobs = [program(tmp_path, name, wait) for name in ("first", "second")]
    ids = submit(jobs, settings(array_parallelism=1), folder=tmp_path / "slurm")
    here.wait_until(lambda: states(ids)[ids[0]].state == "RUNNING", 60)
    assert states(ids)[ids[1]].state == "PENDING" and "JobArrayTaskLimit" in states(ids)[ids[1]].reason
    cancel(ids[1:])
    cancel(ids)
    here.wait_until(lambda: not any(state.is_active for state in states(ids).values()), 60)
    assert {state.state for state in states(ids).values()} == {"CANCELLED"}
    assert states([]) == {} and states(["999999"])["999999"].state == "UNKNOWN"
    # A cluster without a database: sacct is there and refuses. What is over is in the queue's memory for minutes.
    tool = tmp_path / "bin" / "sacct"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho 'Slurm accounting storage is disabled'\nexit 1\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    assert {state.state for state in states(ids).values()} == {"CANCELLED"}
    assert states(["999999"])["999999"] == JobState(state="UNKNOWN", reason="", exit_code="")


def test_a_queued_job_keeps_its_configuration(cluster: Cluster, tmp_path: Path) -> None:
    own = tmp_path / "conf" / "advantage" / "mine.yaml"
    own.parent.mkdir(parents=True)
    own.write_text((CONF_DIR / "advantage" / "grpo.yaml").read_text().replace("epsilon: 1", "epsilon: 2"))
    text = own.read_text()
    folder = tmp_path / "out" / "run"
    flags = ("--config-dir", str(tmp_path / "conf"))
    words = ("advantage=mine", "trainer.max_steps=1", "eval.num_prompts=0")
    job = cluster.submit(folder, "cluster.sbatch=['--begin=now+15']", *words, flags=flags)
    own.write_text("_target_: no.such.thing\n")
    again = cluster.type("cluster=slurm", f"run_dir={folder}", f"output_dir={folder.parent}", *words, flags=flags)
    assert again.returncode == 2, "the edited file is wrong, as it should be"
    own.write_text(text.replace("norm_by_std: true", "norm_by_std: false"))
    assert cluster.output("squeue", "-h", "-j", job, "-o", "%T") == "PENDING"
    assert cluster.wait_for_end(job) == ["COMPLETED"], output(folder)
    used = yaml.safe_load((folder / "config.yaml").read_text())["advantage"]
    assert (used["epsilon"], used["norm_by_std"]) == (2e-6, True)


def test_the_same_command_does_not_start_a_second_job(cluster: Cluster, tmp_path: Path) -> None:
    """While the first waits; when it has been cancelled, the command continues in the same folder."""
    words = ("cluster=slurm", "cluster.wait=false", f"output_dir={tmp_path}", "cluster.sbatch=['--begin=now+600']")
    first, second = (cluster.type(*words) for _ in range(2))
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    (folder,) = (tmp_path / "demo").glob("*/*")
    job = json.loads((folder / "slurm" / "job.json").read_text())["job_id"]
    assert f"Job {job} has this run already (PENDING)" in second.stdout
    cluster.output("scancel", job)
    third = cluster.type(*words)
    assert third.returncode == 0 and str(folder) in third.stdout
    assert list((tmp_path / "demo").glob("*/*")) == [folder]
    newer = json.loads((folder / "slurm" / "job.json").read_text())["job_id"]
    assert newer != job
    fourth = cluster.type(*words, "resume=never")
    assert fourth.returncode == 0 and len(list((tmp_path / "demo").glob("*/*"))) == 2
    cluster.output("scancel", "--user=root")
