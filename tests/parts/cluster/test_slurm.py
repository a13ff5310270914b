"""`cluster=slurm` where there is no Slurm: settings, layout, script, the record of attempts, how launchers talk."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from atropos_exp.assembly.check import check
from atropos_exp.config.build import build
from atropos_exp.config.freeze import config_hash, freeze_config
from atropos_exp.config.origin import CONF_DIR
from atropos_exp.errors import UserError
from atropos_exp.parts.cluster.slurm.attempts import Attempts, read_attempts
from atropos_exp.parts.cluster.slurm.board import Board, Pulse
from atropos_exp.parts.cluster.slurm.cluster import Slurm
from atropos_exp.parts.cluster.slurm.control import interface_towards, job_state, own_job
from atropos_exp.parts.cluster.slurm.layout import Layout
from atropos_exp.parts.cluster.slurm.script import script_text
from atropos_exp.processes.child import ENGINE_DEVICES

PLAIN = yaml.safe_load((CONF_DIR / "cluster" / "slurm.yaml").read_text())


def settings(**changes: object) -> Slurm:
    found = build({**PLAIN, **changes}, "cluster")
    assert isinstance(found, Slurm)
    return found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nodes": 0}, "nodes: got 0, expected at least 1"),
        ({"time_minutes": 2, "signal_seconds": 120}, "told to stop as soon as it starts"),
        ({"gpus_per_node": 2, "ranks_per_node": 4}, "ranks_per_node: got 4, but a node has gpus_per_node=2"),
        ({"gpus_per_node": 2, "engine_gpus": 2}, "leaves no device"),
        ({"engine_gpus": 1}, "leaves no device"),
        ({"sbatch": ["--time=3"]}, "sbatch: --time is cluster.time_minutes; set it there"),
        ({"sbatch": ["exclusive"]}, "sbatch: got 'exclusive', expected --option or --option=value"),
        ({"container_mounts": ["/a:/b"]}, "no container_image to mount into"),
    ],
)
def test_wrong_settings_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        settings(**changes)


def test_ranks_are_numbered_over_nodes_without_the_engines_tasks() -> None:
    layout = settings(nodes=2, gpus_per_node=4, engine_gpus=1).layout
    assert layout.world_size == 7 and settings(nodes=2, gpus_per_node=4, engine_gpus=1).num_processes == 7
    seen = [(place.node, place.local, place.rank) for place in layout.places()]
    assert seen == [(0, 0, 0), (0, 1, 1), (0, 2, 2), (0, 3, None), (1, 0, 3), (1, 1, 4), (1, 2, 5), (1, 3, 6)]
    # Ranks on half of the devices leave room for the engine: nobody has to give way.
    half = settings(nodes=1, gpus_per_node=8, ranks_per_node=4, engine_gpus=2).layout
    assert [place.rank for place in half.places()] == [0, 1, 2, 3]
    assert settings(nodes=3).num_processes == 3, "one rank a node on CPUs"


def test_the_environment_of_a_rank() -> None:
    layout = Layout(nodes=2, ranks_per_node=2, gpus_per_node=4, engine_gpus=2)
    given = {"CUDA_VISIBLE_DEVICES": "4,5,6,7", "SLURM_CPUS_PER_TASK": "3"}
    zero = layout.environment(layout.place(0, 0), address="10.0.0.1", port=5, given=given)
    last = layout.environment(layout.place(1, 1), address="10.0.0.1", port=5, given={**given, "OMP_NUM_THREADS": "1"})
    assert zero[ENGINE_DEVICES] == "6,7" and ENGINE_DEVICES not in last
    assert "CUDA_VISIBLE_DEVICES" not in zero | last, "as Slurm gave it"
    assert (zero["RANK"], zero["LOCAL_RANK"], zero["LOCAL_WORLD_SIZE"], zero["OMP_NUM_THREADS"]) == ("0", "0", "2", "3")
    assert (last["RANK"], last["LOCAL_RANK"], last["GROUP_RANK"], last["WORLD_SIZE"]) == ("3", "1", "1", "4")
    assert last["MASTER_ADDR"] == "10.0.0.1" and last["MASTER_PORT"] == "5" and "OMP_NUM_THREADS" not in last


def test_an_engine_sees_the_devices_that_are_kept_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from atropos_exp.parts.engine.process import ServerProcess

    def seen() -> str:
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        program = ServerProcess("this_prints_its_environment", (), python=str(shell), environment={}, log=log)
        program.child.wait(20)
        program.stop()
        return log.read_text().strip()

    shell = tmp_path / "python"
    shell.write_text('#!/bin/sh\necho "$CUDA_VISIBLE_DEVICES"\n')
    shell.chmod(0o755)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert seen() == "4,5,6,7"
    monkeypatch.setenv(ENGINE_DEVICES, "6,7")
    assert seen() == "6,7"


def test_the_script_asks_for_what_the_settings_say(tmp_path: Path) -> None:
    chosen = settings(
        nodes=2, gpus_per_node=8, partition="gpu", account="me", qos="high", constraint="h100", mem_gb=200.0,
        sbatch=["--exclusive", "--comment=a b"], srun=["--cpu-bind=cores"], setup=["module load cuda"],
        python="apptainer exec --nv run.sif python", requeue=False, signal_seconds=300,
    )  # fmt: skip
    text = script_text(chosen, name="demo", folder=tmp_path / "a b", run_folders=[tmp_path])
    for line in (
        *("--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=4", "--mem=204800M", "--time=1440"),
        *("--partition=gpu", "--account=me", "--qos=high", "--constraint=h100", "--signal=USR2@300", "--no-requeue"),
        *("--exclusive", "--comment='a b'", "--job-name=demo", "--open-mode=append"),
    ):
        assert f"#SBATCH {line}\n" in text, line
    assert (
        "\nmodule load cuda\n" in text and " --cpu-bind=cores apptainer exec --nv run.sif python -u -m submitit" in text
    )
    assert text.index("module load") < text.index("srun ") < text.index("scontrol requeue")
    assert subprocess.run(["bash", "-n"], input=text, text=True, timeout=30).returncode == 0
    array = script_text(settings(array_parallelism=2), name="demo", folder=tmp_path, run_folders=[tmp_path] * 6)
    assert "#SBATCH --array=0-5%2\n" in array and "#SBATCH --requeue\n" in array


def test_the_end_of_the_script_queues_again_what_the_ranks_could_not(tmp_path: Path) -> None:
    """Its last lines, run by a shell, with a `scontrol` that notes how it is called."""
    text = script_text(settings(), name="demo", folder=tmp_path, run_folders=[tmp_path, tmp_path / "other"])
    end = text.partition("# teardown\n")[2]
    (tmp_path / "bin").mkdir()
    tool = tmp_path / "bin" / "scontrol"
    tool.write_text(
        f'#!/bin/sh\nif [ "$1" = show ]; then cat {tmp_path}/state; else echo $* >> {tmp_path}/called; fi\n'
    )
    tool.chmod(0o755)
    (tmp_path / "state").write_text("JobId=12 JobState=RUNNING Reason=None\n")
    environment = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "1"}
    own = tmp_path / "other" / "slurm"
    own.mkdir(parents=True)

    def shell(code: int) -> int:
        return subprocess.run(["bash", "-c", f"(exit {code})\n{end}"], env=environment, timeout=30).returncode

    (own / "attempt_12.1").mkdir()
    assert (shell(0), shell(75)) == (0, 75) and not (tmp_path / "called").exists()
    (own / "requeue_12").touch()
    assert shell(75) == 0 and (tmp_path / "called").read_text() == "requeue 12\n"
    assert not (own / "requeue_12").exists() and shell(75) == 75, "once"
    (own / "requeue_12").touch()
    environment |= {"SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "4"}
    assert shell(75) == 0 and (tmp_path / "called").read_text() == "requeue 12\nrequeue 9_4\n"
    (tmp_path / "called").write_text("requeue 12\n")
    environment = {key: value for key, value in environment.items() if "ARRAY" not in key}
    (own / "attempt_12.1").rmdir()  # srun has failed before any rank was there: three times at most
    assert [shell(1) for _ in range(3)] == [0, 0, 1] and shell(0) == 0
    assert (tmp_path / "called").read_text() == "requeue 12\n" * 3
    (tmp_path / "not_started_12").unlink()
    (tmp_path / "state").write_text("JobId=12 JobState=CANCELLED Reason=None\n")
    assert shell(1) == 1 and (tmp_path / "called").read_text() == "requeue 12\n" * 3


def test_what_becomes_of_a_job_whose_processes_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Slurm 22.05 prints at that time, as it was seen: COMPLETING for a cancelled job and for one queued again."""
    tool = tmp_path / "scontrol"
    tool.write_text(f'#!/bin/sh\ncat "{tmp_path}/said"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    def state(words: str) -> str | None:
        (tmp_path / "said").write_text(f"JobId=3 {words} Reason=None\n")
        return job_state("3", restarts=1)

    assert state("JobState=RUNNING Restarts=1") == "RUNNING"
    assert state("JobState=COMPLETING Restarts=1") == "CANCELLED"
    assert state("JobState=COMPLETING Restarts=2") == "REQUEUED"
    assert state("slurm_load_jobs error") is None


def test_an_element_of_an_array_is_never_taken_for_the_array() -> None:
    last = {"SLURM_JOB_ID": "3", "SLURM_ARRAY_JOB_ID": "3", "SLURM_ARRAY_TASK_ID": "2"}
    assert (own_job(last), own_job({"SLURM_JOB_ID": "7"})) == ("3_2", "7")


def test_how_long_attempts_took(tmp_path: Path) -> None:
    rows = [
        {"event": "start", "attempt": "1.0", "time": 100.0, "step": -1},
        {"event": "signal", "attempt": "1.0", "time": 130.0, "signal": "SIGUSR2"},  # then its node died
        {"event": "start", "attempt": "1.1", "time": 200.0, "step": 3, "earlier_until": 150.0},
        {"event": "end", "attempt": "1.1", "time": 260.0, "how": "finished", "step": 9, "code": 0, "reason": ""},
    ]
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "attempts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [found.until - found.began for found in read_attempts(tmp_path)] == [50.0, 60.0]


def record(folder: Path, step: int) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": number}) + "\n" for number in range(step + 1)))


def test_failures_count_until_the_run_gets_further(tmp_path: Path) -> None:
    def attempt(number: int, step: int, how: str | None = None, signal: str = "") -> int:
        """One attempt that reaches `step`; the failures that the next one finds."""
        own = Attempts(tmp_path, f"1.{number}")
        own.start()
        record(tmp_path, step)
        if signal:
            own.signal(signal)
        if how:
            own.end(how, code=1)
        return Attempts(tmp_path, f"1.{number + 1}").failures_without_progress()

    assert attempt(0, 4, "failed") == 1
    assert attempt(1, 4, "failed") == 2
    assert attempt(2, 4, "requeued", "SIGUSR2") == 2, "a preemption is no failure"
    assert attempt(3, 4, None, "SIGTERM") == 2, "nor is one that did not leave the time to save"
    assert attempt(4, 6, "failed") == 1, "it got further"
    assert attempt(5, 3, None) == 2, "killed while it repeated steps"
    assert attempt(6, 6, None) == 3
    assert attempt(7, 6, "gave_up") == 0, "somebody has looked at it"
    assert [found.how for found in read_attempts(tmp_path)][-3:] == [None, None, "gave_up"]
    with (tmp_path / "slurm" / "attempts.jsonl").open("a") as file:
        file.write('{"event": "sta')  # torn
    assert len(read_attempts(tmp_path)) == 8


def test_launchers_meet_and_hear_the_verdict(tmp_path: Path) -> None:
    head, other = Board(tmp_path, "7.0"), Board(tmp_path, "7.0")
    Board(tmp_path, "6.0").begin()
    head.begin()
    assert not (tmp_path / "slurm" / "attempt_6.0").exists()
    timer = threading.Timer(0.2, lambda: head.meet(address="10.1.1.1", port=99))
    timer.start()
    assert other.wait_for_meeting(seconds=20, give_up=lambda: False) == ("10.1.1.1", 99)
    timer.join()
    assert other.failures() == [] and head.verdict() is None
    other.fail(3, "rank 3 was killed by SIGKILL")
    assert head.failures() == ["rank 3 was killed by SIGKILL"]
    pulse = Pulse(other)
    head.beat()
    assert pulse.silent_for() < 5
    head.decide(75)
    assert other.verdict() == 75
    empty = Board(tmp_path, "8.0")
    with pytest.raises(TimeoutError, match="does the first node see the same run folder"):
        empty.wait_for_meeting(seconds=0, give_up=lambda: False)
    assert empty.wait_for_meeting(seconds=5, give_up=lambda: True) is None


def test_the_interface_towards_this_machine_is_the_loopback() -> None:
    assert interface_towards("127.0.0.1") == "lo"
    assert interface_towards("no.such.host.invalid") is None


def composed(*overrides: str) -> object:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF_DIR)):
        return compose("config", overrides=list(overrides))


def test_a_frozen_configuration_is_the_same_one_and_private(tmp_path: Path) -> None:
    config = composed(
        "cluster=slurm", "loss=gspo", "trainer.learning_rate=3e-7", f"output_dir={tmp_path}", "resume=never"
    )
    assert OmegaConf.is_config(config)
    path = tmp_path / "slurm" / "config.yaml"
    arguments = freeze_config(config, path, run_dir=tmp_path / "run")  # type: ignore[arg-type]
    assert arguments == ("-m", "atropos_exp.run", "--frozen", str(path))
    assert path.stat().st_mode & 0o777 == 0o600
    again = OmegaConf.load(path)
    assert config_hash(again) == config_hash(config)  # type: ignore[arg-type]
    assert (again.run_dir, again.resume) == (str(tmp_path / "run"), "auto")
    assert again.cluster == config.cluster and again.trainer.learning_rate == 3e-7  # type: ignore[attr-defined]


def test_the_device_is_that_of_the_nodes_not_of_the_login_node() -> None:
    on_gpus, mistakes = check(
        composed("cluster=slurm", "cluster.gpus_per_node=8", "device=cuda", "cluster.dry_run=true")
    )  # type: ignore[arg-type]
    assert mistakes == [] and on_gpus is not None
    assert on_gpus.device == "cuda" and on_gpus.sizes.world_size == 8


def test_without_slurm_a_run_is_refused_and_a_dry_run_works(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "atropos_exp.run", "cluster=slurm", f"output_dir={tmp_path}"]
    environment = {"PATH": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "sbatch and srun not found" in done.stderr
    done = subprocess.run(
        [*command, "cluster.dry_run=true"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("#!/bin/bash\n") and "\n# 1 node(s) x 1 task(s), 1 trainer rank(s)\n" in done.stdout
    assert list(tmp_path.iterdir()) == []
