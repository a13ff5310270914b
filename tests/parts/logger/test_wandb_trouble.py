"""A run neither notices nor waits when W&B's server fails, hangs or dies half way, and what it missed can be synced."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest

from atropos_exp.parts.logger.remote import RemoteLogger
from atropos_exp.parts.logger.wandb import Mode, Wandb
from atropos_exp.types import RunDescription, StepMetrics
from tests.helpers.paths import ROOT

KEY = "0123456789abcdef" * 2 + "01234567"
SUMMARY = {"status": "finished", "steps": 3}


@pytest.fixture(autouse=True)
def account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_API_KEY", KEY)


def start(folder: Path, *, resumed: bool = False, **changed: Any) -> RemoteLogger:
    given: dict[str, Any] = {
        "live": False, "every": 1000, "mode": Mode.online, "project": "project", "entity": None, "group": "pair",
        "job_type": "train", "tags": ["a"], "init_timeout": 30.0, "finish_timeout": 30.0, "queue_size": 1000,
    }  # fmt: skip
    logger = Wandb(**given | changed).start(
        RunDescription(folder=folder, config={"seed": 7}, name="trial", resumed=resumed, total_steps=100)
    )
    assert isinstance(logger, RemoteLogger)
    return logger


def work() -> None:
    """A step of about 50 ms."""
    deadline = time.perf_counter() + 0.05
    numbers = np.ones((64, 64))
    while time.perf_counter() < deadline:
        numbers = numbers @ numbers / 64


def steps(logger: RemoteLogger, first: int, last: int) -> tuple[list[float], list[float]]:
    """Seconds of each `log` and of each whole step."""
    logged, whole = [], []
    for number in range(first, last + 1):
        begin = time.perf_counter()
        work()
        middle = time.perf_counter()
        logger.log(StepMetrics(step=number, values={f"loss/{at}": number / 7 for at in range(60)}))
        end = time.perf_counter()
        logged.append(end - middle)
        whole.append(end - begin)
    return logged, whole


def history(server: Any) -> list[int]:
    (run,) = server.runs.values()
    return [row["step"] for _, row in sorted(run["history"].items()) if "step" in row]


def until(what: Callable[[], bool], said: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, f"{said}: not within {seconds:.0f} s"
        time.sleep(0.05)


def test_server_errors_are_retried_and_nothing_is_lost(
    tmp_path: Path, wandb_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", wandb_server.url)
    logger = start(tmp_path)
    steps(logger, 1, 5)
    until(lambda: bool(wandb_server.runs), "a run at the server")
    wandb_server.errors = 2
    logged, whole = steps(logger, 6, 40)
    logger.close(SUMMARY)
    assert wandb_server.num_errors == 2
    assert history(wandb_server) == list(range(1, 41))
    (run,) = wandb_server.runs.values()
    assert (run["jobType"], run["groupName"]) == ("train", "pair")
    assert median(logged) < 0.01 * median(whole)


def test_a_server_that_hangs_half_way_and_comes_back(
    tmp_path: Path, wandb_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", wandb_server.url)
    logger = start(tmp_path, finish_timeout=60.0)
    steps(logger, 1, 5)
    until(lambda: bool(wandb_server.runs), "a run at the server")
    wandb_server.hang.set()
    logged, whole = steps(logger, 6, 40)
    assert median(logged) < 0.01 * median(whole)
    wandb_server.hang.clear()
    logger.close(SUMMARY)
    assert sorted(set(history(wandb_server))) == list(range(1, 41))
    assert logger.num_dropped == 0


def test_a_server_that_dies_half_way(
    tmp_path: Path,
    wandb_server: Any,
    new_wandb_server: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", wandb_server.url)
    logger = start(tmp_path, finish_timeout=3.0)
    steps(logger, 1, 5)
    until(lambda: bool(wandb_server.runs), "a run at the server")
    wandb_server.die()
    logged, whole = steps(logger, 6, 60)
    assert median(logged) < 0.01 * median(whole)
    begin = time.perf_counter()
    with caplog.at_level("WARNING"):
        logger.close(SUMMARY)
    assert time.perf_counter() - begin < 15.0  # 3 s, and a busy machine
    command = re.search(r"for the rest: (wandb sync .*)", caplog.text)
    assert command, caplog.text

    later = new_wandb_server(wandb_server.server_port)
    sync(command[1])
    assert sorted(set(history(later))) == list(range(1, 61))


def test_the_command_of_an_offline_run_uploads_all_attempts_as_one_run(
    tmp_path: Path, wandb_server: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", wandb_server.url)
    first = start(tmp_path, mode=Mode.offline)
    steps(first, 1, 3)
    first.close({"status": "stopped"})
    time.sleep(1.1)  # W&B names the folder of an attempt by the second
    second = start(tmp_path, mode=Mode.offline, resumed=True)
    steps(second, 2, 6)  # a run that was killed trains steps again
    second.close(SUMMARY)
    commands = re.findall(r"recorded offline; to upload: (wandb sync .*)", capsys.readouterr().out)
    assert len(shlex.split(commands[0])) == 3 and len(shlex.split(commands[-1])) == 4

    sync(commands[-1])
    ((run_id, run),) = wandb_server.runs.items()
    assert run_id == (tmp_path / "wandb_run_id.txt").read_text().strip()
    assert [row["step"] for _, row in sorted(run["history"].items())] == [1, 2, 3, 4, 5, 6]
    assert run["summary"]["run/status"] == "finished"


def sync(command: str) -> None:
    """Type the command that was printed."""
    program, *arguments = shlex.split(command)
    assert program == "wandb"
    done = subprocess.run(
        [sys.executable, "-m", "wandb", *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_a_real_run_loses_less_than_a_hundredth_to_a_server_that_dies(
    tmp_path: Path, wandb_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import json

    monkeypatch.setenv("WANDB_BASE_URL", wandb_server.url)
    folder = tmp_path / "run"
    run = subprocess.Popen(
        [sys.executable, "-m", "atropos_exp.run", "rollout=local", "logger=wandb", "logger.mode=online",
         "logger.finish_timeout=2", "trainer.max_steps=5", "eval.num_prompts=8", "eval.every=0",
         "eval.samples_per_prompt=0", "batch_size=16", f"output_dir={tmp_path}", f"run_dir={folder}"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        until(lambda: bool(wandb_server.runs) or run.poll() is not None, "a run at the server", 200)
        wandb_server.die()
        said, _ = run.communicate(timeout=200)
    finally:
        run.kill()
        run.wait()
    assert run.returncode == 0, said
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5]
    logged = sum(row.get("time/log_s") or 0 for row in rows)
    assert logged < 0.01 * sum(row["time/step_s"] for row in rows)
