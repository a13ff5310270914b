"""docs/extending.md is true: its files, written into a copy of the package, are parts that train."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.paths import ROOT

EXAMPLE = re.compile(r"^`((?:atropos_exp|conf)/[\w./]+)`\n\n```(?:python|yaml)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SMALL = (
    "batch_size=8", "group_size=4", "trainer.max_steps=2", "eval.num_prompts=8", "eval.every=0",
    "eval.samples_per_prompt=0", "logger=none",
)  # fmt: skip


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with every example of the document in it."""
    root = tmp_path_factory.mktemp("checkout")
    for name in ("atropos_exp", "data_prep", "conf"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    found = EXAMPLE.findall((ROOT / "docs" / "extending.md").read_text(encoding="utf-8"))
    groups = {Path(path).parent.name for path, _ in found if path.startswith("conf/")}
    assert groups == {"reward", "data", "advantage", "loss", "env", "cluster", "engine"}
    assert len(found) == 16  # a transport is an engine's
    for path, text in found:
        assert not (root / path).exists(), f"{path} is there already"
        (root / path).write_text(text, encoding="utf-8")
    return root


def train(package: Path, folder: Path, *overrides: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    done = subprocess.run(
        [sys.executable, "-m", "atropos_exp.run", *SMALL, f"output_dir={folder}", f"run_dir={folder / 'run'}",
         *overrides],
        cwd=package, env={**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert (summary["status"], summary["sync"]["count"], summary["sync"]["verified"]) == ("finished", 3, 3)
    return summary, rows


@pytest.mark.slow
@pytest.mark.timeout(960)
def test_reward_data_advantage_loss_cluster_and_transport(package: Path, tmp_path: Path) -> None:
    _, rows = train(
        package, tmp_path, "rollout=local", "reward=closeness", "data=counting", "advantage=median", "loss=reinforce",
        "cluster=niced", "cluster.niceness=1", "engine=hf_ram_disk",
    )  # fmt: skip
    assert 0 < rows[1]["reward/mean"] < 1  # near answers count
    assert rows[1]["grad/norm"] > 0 and rows[1]["policy/clip_fraction"] == 0
    assert [row["eval/counting/num"] for row in rows if "eval/counting/num" in row] == [8, 8]


@pytest.mark.slow
@pytest.mark.timeout(960)
def test_an_engine_in_this_process(package: Path, tmp_path: Path) -> None:
    _, rows = train(package, tmp_path, "rollout=local", "engine=in_process")
    assert max(row["policy/logprob_gap_max"] for row in rows[1:]) < 1e-3
    assert not (tmp_path / "run" / "log" / "engine.log").exists()


@pytest.mark.slow
@pytest.mark.timeout(960)
def test_an_environment(package: Path, tmp_path: Path) -> None:
    summary, rows = train(package, tmp_path, "rollout=atropos", "env=even_numbers", "max_prompt_length=16")
    assert summary["rollouts"]["atropos"] == 2 * 8 * 4 and summary["rollouts"]["local"] == 0
    assert 0.2 < rows[1]["reward/mean"] < 0.8  # half of all numbers are even


def test_no_example_is_longer_than_a_line_may_be() -> None:
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    assert max(map(len, text.splitlines())) <= 120
