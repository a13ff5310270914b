"""A real sweep of six small runs, as a user types it: one fails, one is killed, the YAML is edited meanwhile."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from atropos_exp.runs.sweep_folder import SweepFolder
from tests.helpers.page_text import Text, expected_comparison
from tests.sweep.test_local import assert_nothing_is_left

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
STEPS = 8
FAILS, DIES = 3, 4
LINE = ("-m", "--config-dir", "own", "experiment=mine", "advantage=grpo,dr_grpo", "seed=0,1,2", "sweep.parallel=2",
        "sweep.dir=swept", "eval.every=2", "cluster.num_processes=1")  # fmt: skip
POINTS = [(advantage, seed) for advantage in ("grpo", "dr_grpo") for seed in (0, 1, 2)]


def write_experiment(folder: Path, steps: int) -> None:
    path = folder / "own" / "experiment" / "mine.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"# @package _global_\ntrainer:\n  max_steps: {steps}\n")


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]


def accuracies(folder: Path) -> dict[int, float]:
    name = "eval/arithmetic/accuracy"
    return {row["step"]: row[name] for row in metrics(folder) if row.get(name) is not None}


def started(folder: SweepFolder) -> list[int]:
    return [event["number"] for event in folder.events() if event["event"] == "started"]


@pytest.fixture(scope="module")
def first(line: Any) -> dict[str, Any]:
    """The sweep up to the end of its first go, and what was seen on the way."""
    write_experiment(line.folder, STEPS)
    begin = time.monotonic()
    done = line.sweep(*LINE, "sweep.wait=false")
    seconds = time.monotonic() - begin
    sweep = SweepFolder(line.folder / "swept")
    assert done.returncode == 0, done.stdout + done.stderr
    states_at_return = line.after("status", "swept").stdout
    write_experiment(line.folder, 50)  # an edit while most runs still wait
    obstacle = sweep.run_folder(FAILS)
    obstacle.mkdir()
    (obstacle / "checkpoints").write_text("no folder")

    def pid() -> int:
        found = [event["pid"] for event in sweep.events() if event["event"] == "started" and event["number"] == DIES]
        return found[0] if found else 0

    line.wait_until(pid, "the run that is to be killed starts")
    line.wait_until((sweep.run_folder(DIES) / "metrics.jsonl").exists, "it trains")
    os.kill(pid(), signal.SIGKILL)
    waited = line.after("wait", "swept")
    return {"seconds": seconds, "at_return": states_at_return, "waited": waited, "sweep": sweep, "output": done.stdout}


@pytest.fixture(scope="module")
def second(line: Any, first: dict[str, Any]) -> dict[str, Any]:
    """After what was left has been done."""
    sweep = first["sweep"]
    (sweep.run_folder(FAILS) / "checkpoints").unlink()
    before = {
        number: (sweep.run_folder(number) / "summary.json").stat().st_mtime_ns
        for number in range(6)
        if number not in (FAILS, DIES)
    }
    page = Text((sweep.path / "report.html").read_text())
    num_started = len(started(sweep))
    resumed = line.after("resume", "swept")
    return {"before": before, "page": page, "again": started(sweep)[num_started:], "resumed": resumed}


def test_without_waiting_it_returns_at_once(first: dict[str, Any]) -> None:
    assert "6 runs queued" in first["output"]
    assert first["seconds"] < 120, "composing six configurations, not running them"
    assert "pending" in first["at_return"]
    assert "finished" not in first["at_return"]


def test_the_first_go_reports_every_run_truly(first: dict[str, Any]) -> None:
    waited = first["waited"]
    assert waited.returncode == 1, waited.stdout + waited.stderr
    assert "4 finished, 1 failed, 1 killed" in waited.stdout
    failed = re.search(r"003 advantage=dr_grpo, seed=0: failed: (.*)", waited.stdout)
    assert failed and "checkpoints" in failed[1]
    assert "004 advantage=dr_grpo, seed=1: killed: killed by SIGKILL" in waited.stdout
    assert "python -m atropos_exp.sweep resume" in waited.stdout
    assert_nothing_is_left(first["sweep"])


def test_no_run_saw_the_edit(first: dict[str, Any], second: dict[str, Any]) -> None:
    for number, (advantage, seed) in enumerate(POINTS):
        folder = first["sweep"].run_folder(number)
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert (config["trainer"]["max_steps"], config["seed"]) == (STEPS, seed)
        assert config["advantage"]["norm_by_std"] is (advantage == "grpo")
        assert [row["step"] for row in metrics(folder)] == list(range(STEPS + 1))
        assert (first["sweep"].config_path(number).stat().st_mode & 0o077) == 0, "it may hold a secret"


def test_the_second_go_does_only_what_was_left(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert second["resumed"].returncode == 0, second["resumed"].stdout + second["resumed"].stderr
    assert sorted(second["again"]) == [FAILS, DIES]
    assert "6 finished" in second["resumed"].stdout
    for number, when in second["before"].items():
        assert (first["sweep"].run_folder(number) / "summary.json").stat().st_mtime_ns == when
    assert_nothing_is_left(first["sweep"])


def test_the_same_command_finds_nothing_to_do(line: Any, second: dict[str, Any]) -> None:
    """The very sweep again, with the YAML as it was; edited, it is another sweep and the folder is not given away."""
    again = line.sweep(*LINE)
    assert again.returncode == 2
    assert "sweep.dir: swept is not empty, and holds no sweep over these runs" in again.stderr
    write_experiment(line.folder, STEPS)
    again = line.sweep(*LINE)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "Nothing is left to do" in again.stdout


def test_the_first_report_names_the_failures(second: dict[str, Any]) -> None:
    text = second["page"].text
    assert "Runs that did not finish" in text
    assert "killed by SIGKILL" in text
    assert "2 of 6 runs are not finished; means are over those that are." in text
    assert "advantage=dr_grpo: One seed only: it cannot tell a difference from chance." in text


def test_the_numbers_of_the_report_are_those_of_the_runs(first: dict[str, Any], second: dict[str, Any]) -> None:
    sweep = first["sweep"]
    finals = {point: accuracies(sweep.run_folder(number))[STEPS] for number, point in enumerate(POINTS)}
    base, other = (np.array([finals[name, seed] for seed in (0, 1, 2)]) for name in ("grpo", "dr_grpo"))
    page = Text((sweep.path / "report.html").read_text())
    rows, p = expected_comparison(base, other, prompts=8)
    for row in rows:
        assert row in page.text
    best = np.mean([max(value for step, value in accuracies(sweep.run_folder(n)).items() if step) for n in range(3)])
    assert f"] {best:.3g} [" in page.text
    assert ("not significant" in page.text) == (p >= 0.05)
    curve = page.data["runs"][1]
    folders = [sweep.run_folder(number) for number in (3, 4, 5)]
    for at, step in enumerate(curve["x"]["step"]):
        if step % 2 == 0:
            assert curve["values"]["eval"][at] == pytest.approx(np.mean([accuracies(f)[int(step)] for f in folders]))
    rewards = [np.mean([metrics(f)[step]["reward/mean"] for f in folders]) for step in range(1, STEPS + 1)]
    assert curve["values"]["reward/mean"][1:] == pytest.approx(rewards)
    tokens = sum(row.get("rollout/num_tokens") or 0 for n in range(6) for row in metrics(sweep.run_folder(n)))
    assert f"{tokens:,.0f}" in page.text
    events = [event for event in sweep.events() if event["event"] in ("started", "ended")]
    hours = sum(event["time"] * (1 if event["event"] == "ended" else -1) for event in events) / 3600
    assert len(events) == 16, "eight attempts"
    assert f"All {hours:.3g}" in page.text


def test_what_is_no_sweep_is_refused(line: Any) -> None:
    done = line.after("status", "own")
    assert done.returncode == 2
    assert done.stderr == "own is not the folder of a sweep: it has no sweep.json\n"
    done = line.start("atropos_exp.run", "--frozen", "nowhere.yaml", timeout=60)
    assert done.returncode == 2
    assert "expected one frozen configuration" in done.stderr
