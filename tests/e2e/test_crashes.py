"""kill -9 at random moments, then the same command again: nothing lost, nothing twice, the same bits at the end."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.helpers.experiments import final_state, metrics, summary
from tests.helpers.kill_loop import KillLoop
from tests.helpers.zygote import Zygote, alive

NUM_KILLS = 12
NUM_STEPS = 100  # more than the kills can let pass, however quick the machine
pytestmark = pytest.mark.slow
RUN = (f"trainer.max_steps={NUM_STEPS}", "checkpoint.every=4", "eval.num_prompts=0")


@pytest.fixture(scope="module")
def zygote():
    with Zygote(*RUN) as started:
        yield started


def last_step(folder: Path) -> int:
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return max(json.loads(line)["step"] for line in lines)
    except (OSError, ValueError):
        return -1


def wait_until(condition, pid: int, folder: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert alive(pid), f"the run ended by itself:\n{(folder.parent / 'output.log').read_text()[-3000:]}"
        assert time.monotonic() < deadline, f"no progress:\n{(folder.parent / 'output.log').read_text()[-3000:]}"
        time.sleep(0.01)


def wait_for_end(pid: int, folder: Path, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while alive(pid):
        assert time.monotonic() < deadline, (folder.parent / "output.log").read_text()[-3000:]
        time.sleep(0.05)


@pytest.mark.timeout(900)
def test_twelve_kills_change_nothing(zygote, tmp_path):
    undisturbed, killed = tmp_path / "a" / "run", tmp_path / "b" / "run"
    undisturbed.parent.mkdir()
    killed.parent.mkdir()
    wait_for_end(zygote.start(undisturbed), undisturbed)
    assert summary(undisturbed)["status"] == "finished"

    moments = random.Random(7)
    reached = -1
    for number in range(NUM_KILLS):
        pid = zygote.start(killed)
        if number == 0:
            time.sleep(moments.uniform(0.1, 1.0))  # during start-up
        else:
            goal = reached + moments.choice((0, 1, 1, 2, 3))
            wait_until(lambda goal=goal: last_step(killed) >= goal, pid, killed)
            time.sleep(moments.uniform(0.0, 0.3))
        assert alive(pid), "it must be killed, not finish"
        os.kill(pid, signal.SIGKILL)
        wait_for_end(pid, killed, 10)
        reached = max(reached, last_step(killed))
        assert reached < NUM_STEPS, "the kills must come before the end"
    wait_for_end(zygote.start(killed), killed)

    assert summary(killed)["status"] == "finished"
    assert summary(killed)["resumed_from"] is not None
    assert [row["step"] for row in metrics(killed)] == list(range(NUM_STEPS + 1)), "no step lost, none twice"
    assert final_state(killed) == final_state(undisturbed)
    for name in ("reward/mean", "loss/policy", "grad/norm"):
        assert [row.get(name) for row in metrics(killed)] == [row.get(name) for row in metrics(undisturbed)]
    assert not list(Path("/dev/shm").glob(f"*{killed.name}*"))


@pytest.mark.timeout(300)
def test_sigterm_finishes_the_step_and_the_same_command_continues(zygote, tmp_path):
    folder = tmp_path / "run"
    pid = zygote.start(folder)
    wait_until(lambda: last_step(folder) >= 2, pid, folder)
    os.kill(pid, signal.SIGTERM)
    wait_for_end(pid, folder, 60)
    stopped = summary(folder)
    assert stopped["status"] == "stopped"
    assert 2 <= stopped["steps"] < NUM_STEPS
    newest = max((folder / "checkpoints").glob("step_*"))
    assert newest.name == f"step_{stopped['steps']:06d}", "the last finished step is saved"
    wait_for_end(zygote.start(folder), folder)
    assert summary(folder)["status"] == "finished"
    assert summary(folder)["resumed_from"] == newest.name


@pytest.mark.timeout(900)
def test_whatever_is_killed_the_weights_are_the_undisturbed_run_s(tmp_path):
    """A few of the kills that `python -m tests.helpers.kill_loop` repeats by the hundred."""
    with KillLoop(tmp_path, seed=3) as loop:
        loop.undisturbed()
        for _ in range(2):
            assert loop.round(num_kills=5) == "equal", loop.last_output()
    assert sum(loop.counts.values()) >= 6, loop.counts
