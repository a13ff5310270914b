"""Runs of the real program, small enough for a test: own processes, servers and weights."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

from tests.helpers.paths import ROOT

SMALL = (
    "rollout=local",
    "batch_size=4",
    "group_size=4",
    "max_response_length=6",
    "eval.num_prompts=8",
    "eval.samples_per_prompt=2",
    "eval.every=0",
    "trainer.learning_rate=1e-4",
    "logger=none",
)


def command(folder: Path, *overrides: str) -> list[str]:
    return [
        sys.executable, "-m", "atropos_exp.run", *SMALL,
        f"output_dir={folder.parent}", f"run_dir={folder}", *overrides,
    ]  # fmt: skip


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run(folder: Path, *overrides: str, timeout: float = 240) -> dict:
    """Run to the end in a process of its own; the summary. Fails with the output unless it ends well."""
    done = subprocess.run(
        command(folder, *overrides), env=environment(), capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return summary(folder)


def run_here(folder: Path, *overrides: str) -> dict:
    """The same in this process: the libraries are imported once for many runs."""
    from hydra import compose, initialize_config_dir

    from atropos_exp.run import run as run_experiment

    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        config = compose("config", overrides=[*command(folder, *overrides)[3:]])
    assert run_experiment(config) == 0
    return summary(folder)


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def final_state(folder: Path) -> dict[str, str]:
    """sha256 of every file of the newest checkpoint: weights, optimizer, random states."""
    newest = max((folder / "checkpoints").glob("step_*"))
    files = [path for path in newest.rglob("*") if path.is_file() and path.name != "manifest.json"]
    assert files
    return {str(path.relative_to(newest)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)} | {
        "step": newest.name
    }
