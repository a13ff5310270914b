"""The states that a real Atropos API can be in, as the doctor tells them."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from atropos_exp.config.freeze import config_hash
from atropos_exp.doctor.line import Level
from atropos_exp.doctor.network import check_atropos
from atropos_exp.parts.atropos.client import ApiDown, AtroposClient, Registration
from atropos_exp.processes.child import Child
from atropos_exp.processes.ports import HeldPort
from atropos_exp.runs.folder import open_run_folder

GROUP = {"tokens": [[1, 2]], "masks": [[-100, 2]], "scores": [1.0]}


@pytest.fixture
def api(tmp_path: Path) -> Iterator[AtroposClient]:
    port = HeldPort()
    client = AtroposClient(f"http://127.0.0.1:{port.number}", batch_seconds=120.0)
    child = Child(
        [sys.executable, "-m", "atroposlib.cli.run_api", "--host", "127.0.0.1", "--port", str(port.number)],
        log=tmp_path / "api.log",
        environment=dict(os.environ),
    )
    deadline = time.monotonic() + 90
    while True:
        try:
            client.check()
            break
        except ApiDown:
            assert child.poll() is None and time.monotonic() < deadline, child.state()
            time.sleep(0.05)
    yield client
    child.stop()
    client.close()


def registration(group: str, *, batch_size: int = 512, max_token_len: int = 41) -> Registration:
    return Registration(
        wandb_group=group, wandb_project="demo", batch_size=batch_size, max_token_len=max_token_len, checkpoint_dir="x",
        save_checkpoint_interval=2, starting_step=0, num_steps=10,
    )  # fmt: skip


def test_free_foreign_ours_and_poisoned(
    api: AtroposClient, checked: Callable[..., Any], folder: Path, finding: Any
) -> None:
    run = checked("rollout=atropos", f"atropos.api_url={api.url}", "atropos.launch=false")
    (line,) = check_atropos(run)
    assert (line.level, line.text) == (Level.ok, f"{api.url} is free")

    api.register(registration("somebody/else", batch_size=64))
    line = finding(check_atropos(run), "atropos")
    assert "serves another run" in line.text and "group 'somebody/else'" in line.text and "batch_size 64" in line.text
    assert "atropos.take_over=true" in line.remedy
    bold = checked("rollout=atropos", f"atropos.api_url={api.url}", "atropos.launch=false", "atropos.take_over=true")
    assert "ends it" in finding(check_atropos(bold), "atropos", Level.warn).text

    opened = open_run_folder(
        output_dir=folder, name="demo", run_dir=None, resume="auto", config_hash=config_hash(run.config)
    )
    assert opened.lock is not None
    opened.lock.close()
    api.reset()
    api.register(registration("/".join(opened.path.parts[-3:])))  # 32 x 16 sequences, 32 + 8 tokens and one
    (line,) = check_atropos(run)
    assert line.level is Level.ok and "this very run" in line.text

    api.reset()
    assert httpx.post(f"{api.url}/scored_data", json=GROUP, timeout=30).json()["status"] == "received"
    line = finding(check_atropos(run), "atropos", Level.warn)
    assert "poisoned" in line.text and "reset" in line.remedy
