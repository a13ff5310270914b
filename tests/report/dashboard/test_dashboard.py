"""The workspace names metrics that exist; both dashboards work with their extra and say what is missing without it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from atropos_exp.config.build import build
from atropos_exp.errors import UserError
from atropos_exp.metrics import sentence
from atropos_exp.processes.ports import HeldPort
from atropos_exp.report.dashboard.workspace import sections
from atropos_exp.types import RunDescription, StepMetrics
from tests.helpers.paths import ROOT

HAS_WORKSPACES = importlib.util.find_spec("wandb_workspaces") is not None
HAS_TRACKIO = importlib.util.find_spec("trackio") is not None
needs_workspaces = pytest.mark.skipif(not HAS_WORKSPACES, reason="needs the extra `dashboard`")
needs_trackio = pytest.mark.skipif(not HAS_TRACKIO, reason="needs the extra `trackio`")


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(
        [sys.executable, "-m", "atropos_exp.report.dashboard", *arguments],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_every_panel_shows_metrics_that_a_run_has() -> None:
    shown = [name for panels in sections(("gsm8k",)).values() for panel in panels for name in panel.metrics]
    assert len(shown) >= 25
    assert [name for name in shown if sentence(name) is None] == []
    assert "eval/gsm8k/accuracy" in shown


@needs_workspaces
def test_the_workspace_that_would_be_sent() -> None:
    done = command("--print", "--project", "mine", "--eval-set", "gsm8k", "--by", "advantage.norm_by_std")
    assert done.returncode == 0, done.stderr
    sent = json.loads(done.stdout)
    assert sent["project"] == "mine"
    text = json.dumps(sent)
    for title, panels in sections(("gsm8k",)).items():
        assert f'"{title}"' in text
        for panel in panels:
            assert f'"{panel.title}"' in text
            for name in panel.metrics:
                assert f'"{name}"' in text
    assert '"groupBy": "advantage.value.norm_by_std"' in text  # W&B keeps a configuration's values under .value


@pytest.mark.skipif(HAS_WORKSPACES, reason="the extra `dashboard` is installed")
def test_without_workspaces_it_says_what_to_install() -> None:
    done = command("--print")
    assert done.returncode == 2 and "pip install 'wandb-workspaces>=0.4.13'" in done.stderr


def test_the_workspace_needs_an_owner() -> None:
    done = command()
    assert done.returncode == 2 and "--entity" in done.stderr


def trackio(folder: Path, **changed: Any) -> Any:
    values = {
        "_target_": "atropos_exp.parts.logger.trackio.Trackio", "live": False, "every": 1000, "project": "trials",
        "group": "pair", "folder": str(folder), "finish_timeout": 60.0, "queue_size": 100,
    }  # fmt: skip
    return build(values | changed, "logger")


def test_impossible_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"logger\.queue_size"):
        trackio(tmp_path, queue_size=0)


@pytest.mark.skipif(HAS_TRACKIO, reason="the extra `trackio` is installed")
def test_without_trackio_it_says_what_to_install(tmp_path: Path) -> None:
    (problem,) = trackio(tmp_path).preflight()
    assert "pip install 'trackio>=0.43'" in problem
    done = command("--local", str(tmp_path))
    assert done.returncode == 2 and "pip install 'trackio>=0.43'" in done.stderr


@needs_trackio
def test_a_run_is_in_the_local_dashboard(tmp_path: Path) -> None:
    import httpx

    run_folder, store = tmp_path / "demo" / "today" / "now", tmp_path / "trackio"
    for resumed, numbers in ((False, (1, 2)), (True, (3,))):
        logger = trackio(store).start(
            RunDescription(folder=run_folder, config={"seed": 7}, name="demo", resumed=resumed, total_steps=3)
        )
        for number in numbers:
            logger.log(StepMetrics(step=number, values={"reward/mean": number / 4}))
        logger.close({"status": "finished"})
    listed = subprocess.run(
        [sys.executable, "-m", "trackio.cli", "list", "runs", "--project", "trials", "--json"],
        env={**os.environ, "TRACKIO_DIR": str(store), "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert "demo/today/now" in listed.stdout, listed.stderr + (run_folder / "log" / "trackio.log").read_text()

    held = HeldPort()
    port = held.number
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    shown = subprocess.Popen(
        [sys.executable, "-m", "atropos_exp.report.dashboard", "--local", str(store), "--no-browser",
         "--port", str(port)],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                page = httpx.get(f"http://127.0.0.1:{port}/", timeout=5.0, follow_redirects=True)
                break
            except httpx.TransportError:
                assert time.monotonic() < deadline and shown.poll() is None, "no dashboard within 60 s"
                time.sleep(0.1)
        assert page.status_code == 200 and "<html" in page.text.lower()
    finally:
        shown.kill()
        shown.wait()
    assert command("--local", str(tmp_path)).returncode == 2  # a folder without runs
