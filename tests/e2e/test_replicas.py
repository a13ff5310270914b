"""A run through Atropos whose engine is two servers, with one of the two killed."""

import os
import signal

import pytest

from tests.helpers.background_run import Run
from tests.helpers.experiments import metrics, summary
from tests.helpers.processes import command_line, descendants

START_SECONDS = 150.0


def engines(run):
    lines = {pid: command_line(pid) for pid in descendants(run.process.pid)}
    servers = [pid for pid, words in lines.items() if "atropos_exp.parts.engine.hf.server" in words]
    return [pid for pid in servers if not any(word.endswith("guard.py") for word in lines[pid])]


def rows_of(log):
    return log.read_text().count("serving ")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_one_of_two_servers_is_killed_under_a_run_through_atropos(tmp_path):
    (tmp_path / "run").mkdir()
    run = Run(
        tmp_path / "run" / "run", "rollout=atropos", "engine.data_parallel_size=2", "engine.max_restarts=1",
        "trainer.max_steps=1000000",
    )  # fmt: skip
    try:
        run.wait_until(lambda: len(run.steps("atropos")) >= 3, "three steps through Atropos", START_SECONDS)
        before = engines(run)
        assert len(before) == 2
        os.kill(before[0], signal.SIGKILL)
        steps = len(run.steps("atropos"))
        run.wait_until(lambda: len(engines(run)) == 2 and engines(run) != before, "a new server", 60)
        run.wait_until(lambda: len(run.steps("atropos")) >= steps + 4, "steps after it", 120)
        assert before[1] in engines(run), "the other one went on"
        run.process.send_signal(signal.SIGTERM)
        assert run.wait(60) == 0
    finally:
        run.stop()
    found = summary(run.folder)
    assert (found["status"], found["rollouts"]["local"]) == ("stopped", 0)
    assert found["sync"]["count"] - found["sync"]["verified"] in (0, 1), "one may have been cut short"
    rows = metrics(run.folder)
    assert [row["step"] for row in rows] == list(range(len(rows)))
    assert rows[-1]["engine/restarts"] == 1
    assert sorted(rows_of(log) for log in (run.folder / "log").glob("engine_*.log")) == [1, 2]
