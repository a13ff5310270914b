from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from atropos_exp.errors import UserError
from atropos_exp.parts.logger.remote import RemoteLogger
from atropos_exp.parts.logger.wandb import Mode, Wandb
from atropos_exp.types import RunDescription, SampleRecord, StepMetrics
from tests.helpers.paths import ROOT

KEY = "0123456789abcdef" * 2 + "01234567"  # of the form that wandb accepts
CANARY = "canary-value-in-no-upload"
SUMMARY = {"status": "finished", "steps": 3, "sync": {"count": 3}}


def settings(**changed: Any) -> Wandb:
    given: dict[str, Any] = {
        "live": False, "every": 1000, "mode": Mode.auto, "project": "project", "entity": None, "group": "pair",
        "job_type": "train", "tags": ["a", "b"], "init_timeout": 30.0, "finish_timeout": 30.0, "queue_size": 1000,
    }  # fmt: skip
    return Wandb(**given | changed)


def start(folder: Path, *, resumed: bool = False, config: dict[str, Any] | None = None, **changed: Any) -> RemoteLogger:
    logger = settings(**changed).start(
        RunDescription(folder=folder, config=config or {"seed": 7}, name="trial", resumed=resumed, total_steps=3)
    )
    assert isinstance(logger, RemoteLogger)
    return logger


def step(number: int) -> StepMetrics:
    return StepMetrics(step=number, values={"reward/mean": number / 4, "policy/mismatch_kl": float("nan")})


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def test_auto_without_a_key_records_offline_everything_it_was_told(
    tmp_path: Path, read_wandb_offline: Callable[[Path], dict[str, Any]]
) -> None:
    logger = start(tmp_path, config={"seed": 7, "engine": {"api_key": CANARY}})
    for number in range(1, 4):
        logger.log(step(number))
    record = SampleRecord(prompt_id="p", prompt="1+1=", completion="2", reward=1.0, advantage=0.5, lag=0)
    logger.samples(3, [record])
    logger.close(SUMMARY)

    found = read_wandb_offline(tmp_path)
    rows = [row for row in found["history"] if "reward/mean" in row]
    assert [(row["step"], row["reward/mean"]) for row in rows] == [(1, 0.25), (2, 0.5), (3, 0.75)]
    assert all("policy/mismatch_kl" not in row for row in rows)  # NaN is no point of a curve
    assert found["axes"] == {"step": "", "*": "step"}
    assert found["config"]["seed"] == 7
    assert found["config"]["engine"] == {"api_key": "<redacted>"}
    assert found["run"].job_type == "train"
    assert (found["run"].run_group, found["run"].project, list(found["run"].tags)) == ("pair", "project", ["a", "b"])
    assert found["summary"]["run/status"] == "finished"
    assert found["exit"] == 0
    (table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/*.json")
    assert json.loads(table.read_text())["data"] == [["p", "1+1=", "2", 1.0, 0.5, 0, ""]]
    assert (tmp_path / "wandb_run_id.txt").read_text().strip() == found["run"].run_id
    assert not any(CANARY.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_online_with_a_key_and_a_resumed_run_continues_the_same_one(
    tmp_path: Path, wandb_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", wandb_server.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("SOME_TOKEN", CANARY)
    first = start(tmp_path, config={"note": f"uses {CANARY}", "url": f"https://me:{CANARY}@host/x"})
    first.log(step(1))
    first.close({"status": "stopped"})
    second = start(tmp_path, resumed=True)
    second.log(step(2))
    second.close({"status": "failed"})

    ((run_id, run),) = wandb_server.runs.items()
    assert run_id == (tmp_path / "wandb_run_id.txt").read_text().strip()
    rows = [row for _, row in sorted(run["history"].items())]
    assert [(row["step"], row["reward/mean"]) for row in rows] == [(1, 0.25), (2, 0.5)]
    assert run["finished"] == 1  # the second attempt failed
    assert run["summary"]["run/status"] == "failed"
    assert wandb_server.bodies and not any(CANARY.encode() in body for body in wandb_server.bodies)
    assert not any(KEY.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_a_server_that_never_answers_neither_stops_nor_slows_the_run(
    tmp_path: Path, wandb_server: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wandb_server.hang.set()
    monkeypatch.setenv("WANDB_BASE_URL", wandb_server.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    logger = start(tmp_path, init_timeout=60.0, finish_timeout=2.0, queue_size=50)
    slowest = 0.0
    for number in range(1, 500):
        begin = time.perf_counter()
        logger.log(StepMetrics(step=number, values={f"loss/{at}": 0.5 for at in range(60)}))
        slowest = max(slowest, time.perf_counter() - begin)
    begin = time.perf_counter()
    with caplog.at_level(logging.WARNING):
        logger.close(SUMMARY)
    assert slowest < 0.05  # a few ms; the rest is for a busy machine
    assert time.perf_counter() - begin < 6.0
    assert logger.num_dropped > 0  # 499 steps do not fit the queue and the pipe
    assert "did not finish within 2 s" in caplog.text
    assert f"missed {logger.num_dropped} messages" in caplog.text


def test_a_short_run_without_a_network_is_recorded_offline_and_soon_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture, read_wandb_offline: Callable[[Path], dict[str, Any]],
) -> None:  # fmt: skip
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and says nothing
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        begin = time.monotonic()
        logger = start(tmp_path, mode=Mode.auto, init_timeout=60.0, finish_timeout=60.0)
        logger.log(StepMetrics(step=1, values={"reward/mean": 0.5}))
        logger.close(SUMMARY)
        assert time.monotonic() - begin < 20
    assert [row["reward/mean"] for row in read_wandb_offline(tmp_path)["history"]] == [0.5]
    assert "no connection, recording offline" in caplog.text
    assert "to upload: wandb sync" in capfd.readouterr().out


def test_a_dead_server_falls_back_to_offline(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wandb_server: Any,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    read_wandb_offline: Callable[[Path], dict[str, Any]],
) -> None:
    wandb_server.hang.set()
    monkeypatch.setenv("WANDB_BASE_URL", wandb_server.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with caplog.at_level(logging.WARNING):
        logger = start(tmp_path, mode=Mode.online, init_timeout=1.0)
        logger.log(step(1))
        logger.close(SUMMARY)
    assert "no connection" in caplog.text
    assert "W&B: recording offline; to upload: wandb sync" in capsys.readouterr().out
    assert [row["step"] for row in read_wandb_offline(tmp_path)["history"]] == [1]


def test_a_killed_run_loses_nothing(tmp_path: Path, read_wandb_offline: Callable[[Path], dict[str, Any]]) -> None:
    script = f"""
import sys, time
from pathlib import Path
from atropos_exp.parts.logger.wandb import Mode, Wandb
from atropos_exp.types import RunDescription, StepMetrics
logger = Wandb(live=False, every=1000, mode=Mode.offline, project="p", entity=None, group=None, tags=[],
               job_type=None, init_timeout=30.0, finish_timeout=30.0, queue_size=1000).start(
    RunDescription(folder=Path({str(tmp_path)!r}), config={{}}, name="n", resumed=False, total_steps=20))
for number in range(1, 21):
    logger.log(StepMetrics(step=number, values={{"reward/mean": 0.5}}))
print("logged", flush=True)
time.sleep(60)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment) as run:
        assert run.stdout is not None
        while b"logged" not in run.stdout.readline():
            assert run.poll() is None
        time.sleep(0.2)  # the queue drains into the pipe
        run.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 30
    while True:
        try:
            found = read_wandb_offline(tmp_path)
        except (ValueError, AssertionError):  # not there yet, or without its header
            found = {"exit": None}
        if found["exit"] is not None:
            break
        assert time.monotonic() < deadline, "W&B's process did not finish the run of its dead parent within 30 s"
        time.sleep(0.1)
    assert [row["step"] for row in found["history"]] == list(range(1, 21))
    assert found["exit"] == 1
    assert found["summary"]["run/status"] == "killed"


def test_disabled_starts_no_process(tmp_path: Path) -> None:
    logger = settings(mode=Mode.disabled).start(
        RunDescription(folder=tmp_path, config={}, name="trial", resumed=False, total_steps=3)
    )
    assert not isinstance(logger, RemoteLogger)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("changed", [{"project": ""}, {"init_timeout": 0.0}, {"queue_size": 0}])
def test_impossible_settings_are_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"^{next(iter(changed))}: got"):
        settings(**changed)


@pytest.mark.parametrize(
    ("mode", "variables", "expected"),
    [
        ("offline", {"WANDB_API_KEY": "x" * 40}, "offline"),
        ("disabled", {"WANDB_API_KEY": "x" * 40}, "disabled"),
        ("auto", {}, "offline"),  # without a key
        ("auto", {"WANDB_MODE": "disabled"}, "disabled"),
        ("online", {"WANDB_BASE_URL": "http://127.0.0.1:9"}, "offline"),  # nobody listens there
    ],
)
def test_other_programs_of_the_run_record_as_it_does(
    mode: str, variables: dict[str, str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    given = settings(mode=Mode(mode), entity="team").environment_variables(tmp_path)
    assert given == {
        "WANDB_MODE": expected, "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true", "WANDB_ENTITY": "team",
    }  # fmt: skip
