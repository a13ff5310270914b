"""A stop ends what waits within seconds, saves what is done, and leaves nothing behind."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.background_run import Run
from tests.helpers.experiments import final_state, metrics, run_here, summary
from tests.helpers.processes import descendants, is_alive

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STARTED_SECONDS = 240
ENDED_SECONDS = 90  # of a loaded machine; most of it is the import of libraries, or the end of Python


def ends(run: Run, number: signal.Signals) -> None:
    """The run takes the signal as a wish, ends in time, and nothing of it stays."""
    family = descendants(run.process.pid)
    run.process.send_signal(number)
    assert run.wait(ENDED_SECONDS) == 0, run.output[-3000:]
    assert summary(run.folder)["status"] == "stopped"
    assert "Traceback" not in run.output and run.output.count(f"{number.name}: ") == 1, run.output
    deadline = time.monotonic() + 20
    while any(is_alive(pid) for pid in family):
        assert time.monotonic() < deadline, "something outlived the run"
        time.sleep(0.1)


@pytest.mark.parametrize("ranks", [1, 2])
def test_while_no_rollouts_come(tmp_path: Path, ranks: int) -> None:
    """The environment sends nothing; `atropos.start_timeout` would be waited for otherwise."""
    idle = tmp_path / "idle.py"
    idle.write_text("import time; time.sleep(3600)")
    run = Run(
        tmp_path / "run", "rollout=atropos", "env=external", "env.name=idle", f"env.python={sys.executable}",
        f"env.command=[{idle}]", "atropos.data_timeout=500", "atropos.start_timeout=500", "trainer.max_steps=2",
        f"cluster.num_processes={ranks}",
    )  # fmt: skip
    run.wait_until(lambda: (run.folder / "metrics.jsonl").exists() and metrics(run.folder), "step 0", STARTED_SECONDS)
    time.sleep(2)
    ends(run, signal.SIGTERM)


def test_while_it_starts_and_in_a_step_of_a_closed_terminal(tmp_path: Path) -> None:
    """Then the same command goes on, to the weights of a run that nobody stopped."""
    overrides = ("trainer.max_steps=12", "checkpoint.every=100", "eval.num_prompts=0")
    run = Run(tmp_path / "stopped", *overrides)
    run.wait_until(lambda: " prompts of " in run.output, "its data", STARTED_SECONDS)
    ends(run, signal.SIGINT)
    again = Run(tmp_path / "stopped", *overrides)
    again.log.write_text("")
    again.wait_until(
        lambda: (again.folder / "metrics.jsonl").exists() and len(metrics(again.folder)) > 2,
        "two steps",
        STARTED_SECONDS,
    )
    again.process.send_signal(signal.SIGHUP)
    assert again.wait(120) == 0, again.output[-3000:]
    assert summary(again.folder)["status"] == "stopped" and "Traceback" not in again.output
    said = (again.folder / "log" / "after_hangup_rank_0.log").read_text()
    assert "SIGHUP: finishing this step, then saving" in said
    found = run_here(tmp_path / "stopped", *overrides)
    assert (found["status"], found["steps"]) == ("finished", 12)
    run_here(tmp_path / "whole", *overrides)
    assert final_state(tmp_path / "stopped") == final_state(tmp_path / "whole")
