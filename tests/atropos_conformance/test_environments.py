"""Runs that start the API and the environments themselves; each of these is killed, and in the end the trainer."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from tests.atropos_conformance import trainer
from tests.atropos_conformance.programs import HERE, START_SECONDS, Run, command_line, wait_for

RECOVERY_SECONDS = 180.0  # until an environment is loaded again and has sent a batch
GONE_SECONDS = 15.0
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def more_steps(run: Run, number: int, what: str) -> None:
    before = trainer.num_steps(run.folder)
    run.wait_until(lambda: trainer.num_steps(run.folder) >= before + number, what, RECOVERY_SECONDS)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def another(run: Run, name: str, old: int) -> int:
    """The process that takes the place of `old`."""
    found: list[int] = run.wait_until(
        lambda: [pid for pid in run.programs(name) if pid != old], f"another {name}", RECOVERY_SECONDS
    )
    return found[0]


def status_of_environment(url: str, number: int) -> int:
    """What the API answers about it: 200 if it has registered."""
    return httpx.request("GET", f"{url}/status-env", json={"env_id": number}, trust_env=False, timeout=30).status_code


@pytest.fixture(scope="module")
def story(started: Any) -> Iterator[SimpleNamespace]:
    told = SimpleNamespace()
    run = started.run("run", steps=1_000_000)
    run.wait_for_steps(2, START_SECONDS)
    (api,), (environment,) = run.programs("api"), run.programs("environment")
    told.api_words, told.environment_words = command_line(api), command_line(environment)
    told.address = listening(api)

    kill(environment)
    second = another(run, "environment", environment)
    more_steps(run, 2, "steps with another environment")

    kill(api)
    told.new_api = another(run, "api", api)
    told.after_api = another(run, "environment", second)
    more_steps(run, 2, "steps with another API")

    told.family = run.family()
    run.process.send_signal(signal.SIGTERM)
    told.code = run.wait(60)
    wait_for(lambda: not run.family(), "all its processes end", GONE_SECONDS, why=lambda: str(run.family()))
    told.run = run
    yield told


def listening(pid: int) -> set[str]:
    """Addresses that a process listens on, in hexadecimal."""
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            inodes.add(os.readlink(entry))
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[1].split(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in inodes}


def test_own_api_is_for_this_machine_only(story: SimpleNamespace) -> None:
    """API started by the trainer: listens on loopback only."""
    assert story.address == {"0100007F"}, "127.0.0.1"


def test_environments_are_kept_near_on_policy(story: SimpleNamespace) -> None:
    """environments started by the trainer: `max_batches_offpolicy` 1."""
    assert any(re.fullmatch(r"--env.max_batches_offpolicy=1", word) for word in story.environment_words)
    lags = [step.step - 1 - one.policy_version for step in story.run.steps() for group in step.groups for one in group]
    assert max(lags) <= 3


def test_killed_environment_is_started_again(story: SimpleNamespace) -> None:
    """environment killed: started again; goes on."""
    assert trainer.status(story.run.folder) == "stopped"


def test_killed_api_is_started_again_with_its_environments(story: SimpleNamespace) -> None:
    """own API killed: both started again; goes on."""
    assert story.new_api and story.after_api


def test_nothing_is_trained_twice_over_restarts(story: SimpleNamespace) -> None:
    """the same: no group twice."""
    ids = [group[0].group_id for step in story.run.steps() for group in step.groups]
    assert len(ids) == len(set(ids))


def test_asked_to_stop_it_leaves_no_process(story: SimpleNamespace) -> None:
    """SIGTERM, own API: stops after the step; no process left."""
    assert story.code == 0
    assert len(story.family) > 4


def test_dead_environment_is_disconnected_and_its_share_not_waited_for(started: Any) -> None:
    """one of two with minimum allocations killed; then kill -9 of the trainer:
    disconnected, the other goes on; no orphan."""
    # Two environments that must each send half of every batch; one is killed and given up. Then kill -9.
    run = started.run(
        "shares",
        steps=1_000_000,
        num_processes=2,
        max_restarts=0,
        environment_arguments={"min_batch_allocation": 0.5},
    )
    run.wait_until(lambda: len(run.programs("environment")) == 2, "two environments", START_SECONDS)
    url = api_url(run)
    run.wait_until(lambda: status_of_environment(url, 1) == 200, "both register", START_SECONDS)
    more_steps(run, 2, "steps with both")
    kill(run.programs("environment")[1])
    more_steps(run, 4, "steps with the other")
    assert len(run.programs("environment")) == 1

    family = run.family()
    run.kill()
    wait_for(lambda: not run.family(), "no orphan after kill -9", GONE_SECONDS, why=lambda: names(run.family()))
    assert len(family) > 4


def api_url(run: Run) -> str:
    words = " ".join(command_line(run.programs("environment")[0]))
    found = re.search(r"--env\.rollout_server_url[= ](\S+)", words)
    assert found, words
    return found[1]


def names(pids: list[int]) -> str:
    return "\n".join(" ".join(command_line(pid)) for pid in pids)


def test_environment_that_does_not_start_is_given_up_with_its_last_words(started: Any) -> None:
    """environment that cannot start: given up after the allowed restarts, with the end of its log."""
    run = started.run("broken", steps=1, environment=[str(HERE / "environments/broken.py")], max_restarts=1)
    assert run.wait(START_SECONDS) != 0
    assert re.search(trainer.CAUSES["an environment that does not start"], run.output), run.output
    assert "this environment has no tasks" in run.output
    assert trainer.status(run.folder) == "failed"


def test_sequences_that_are_too_long_are_named_as_the_cause(started: Any) -> None:
    """no batch, sequences too long: named."""
    run = started.run("growing", steps=100, environment=[str(HERE / "environments/growing.py")], data_timeout=8.0)
    assert run.wait(START_SECONDS) != 0
    assert trainer.num_steps(run.folder) >= 1, "the short ones were trained"
    error = trainer.error(run.folder)
    assert re.search(trainer.CAUSES["sequences that are too long"], error), error
