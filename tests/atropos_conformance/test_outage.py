"""A run that may fall back to its own rollouts, and everything that keeps an API from sending batches, one by one."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from tests.atropos_conformance import trainer
from tests.atropos_conformance.groups import Maker
from tests.atropos_conformance.programs import START_SECONDS, Run, wait_for
from tests.atropos_conformance.proxy import Proxy

SILENCE = 4.0  # seconds without a batch until the run goes on alone
OUTAGE = 3.0  # seconds without an API
PATIENCE = 5.0  # seconds more that it may take to say so
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
PLAIN = (1.0, 0.0, 0.5, 0.25)


def sources(run: Run) -> list[set[str]]:
    """By step, who sampled its groups."""
    return [{one.source for group in step.groups for one in group} for step in run.steps()]


class Watched:
    """A run, and how long it takes to say why it goes on alone."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.seconds: dict[str, float] = {}

    def wait_for_atropos(self, what: str) -> None:
        before = trainer.num_from_atropos(self.run.folder)
        self.run.wait_until(lambda: trainer.num_from_atropos(self.run.folder) > before, f"a batch is trained, {what}")

    def wait_for_cause(self, cause: str, seconds: float) -> None:
        since, pattern = time.monotonic(), re.compile(trainer.CAUSES[cause])
        number = len(pattern.findall(self.run.output))
        self.run.wait_until(lambda: len(pattern.findall(self.run.output)) > number, cause, seconds + 60)
        self.seconds[cause] = time.monotonic() - since - seconds


@pytest.fixture(scope="module")
def story(started: Any) -> Iterator[SimpleNamespace]:
    told = SimpleNamespace()
    maker = Maker(trainer.weights(started.folder, 1), vocabulary=trainer.VOCABULARY, seed=3)

    def batch() -> list[Any]:
        return [maker.group(PLAIN), maker.group(PLAIN)]

    api = started.api()
    told.proxy = proxy = Proxy(api.port)
    started.later(proxy.close)
    run = started.run(
        "run",
        steps=1_000_000,
        api_url=proxy.url,
        falls_back=True,
        start_timeout=SILENCE,
        data_timeout=SILENCE,
        outage_timeout=OUTAGE,
    )
    told.run, watched = run, Watched(run)
    run.wait_until(lambda: api.is_registered, "the trainer registers", START_SECONDS)
    watched.wait_for_cause("nobody has registered", SILENCE)
    run.wait_until(lambda: trainer.num_steps(run.folder) > 0, "it goes on alone")

    environment = started.environment(api.url)
    environment.send(*batch())
    watched.wait_for_atropos("the first one")
    watched.wait_for_cause("a silent environment", SILENCE)

    environment.send(*batch())
    watched.wait_for_atropos("before one with a minimum")
    demanding = started.environment(api.url, min_batch_allocation=0.5)
    demanding.kill()  # dead, and its share of each batch is waited for all the same
    environment.send(*batch())
    watched.wait_for_cause("a minimum allocation", SILENCE)
    told.blocked = api.get("/status")["queue_size"]
    environment.call("POST", "/disconnect-env", {"env_id": demanding.env_id})
    watched.wait_for_atropos("after the dead one is disconnected")

    api.get("/reset_data")  # anybody may
    wait_for(lambda: api.is_registered, "it registers again after a reset", 60, why=lambda: run.output)
    started.environment(api.url).send(*batch())
    watched.wait_for_atropos("after the reset")

    api.kill()
    told.killed = time.monotonic()
    before = trainer.num_steps(run.folder)
    run.wait_until(lambda: trainer.num_steps(run.folder) > before, "it goes on alone")
    told.alone_after = time.monotonic() - told.killed
    api.start()
    told.back = time.monotonic()
    run.wait_until(lambda: api.is_registered, "it registers with the new API")
    told.registered_at = trainer.num_steps(run.folder)
    last = started.environment(api.url)
    last.send(*batch())
    watched.wait_for_atropos("from the new API")

    odd = started.environment(api.url, group_size=3)
    odd.send(maker.group((1.0, 0.0, 0.5)))
    last.send(maker.group(PLAIN))
    watched.wait_for_cause("sizes that do not divide", SILENCE)

    told.family = run.family()
    run.process.send_signal(signal.SIGTERM)
    told.code = run.wait(60)
    told.left = wait_for(lambda: not run.family(), "all its processes end", 15, why=lambda: str(run.family()))
    told.seconds = watched.seconds
    yield told


@pytest.mark.parametrize(
    "cause", ["nobody has registered", "a silent environment", "a minimum allocation", "sizes that do not divide"]
)
def test_stall_is_explained_in_time(story: SimpleNamespace, cause: str) -> None:
    """no batch (no environment, silence, minimum allocation, sizes): the cause is named within the deadline + 5 s."""
    assert story.seconds[cause] < PATIENCE


def test_dead_environment_with_a_minimum_blocks_until_disconnected(story: SimpleNamespace) -> None:
    """dead environment with a minimum allocation: blocks all until disconnected, then goes on."""
    assert story.blocked == 2


def test_silent_api_does_not_stop_a_run_that_may_fall_back(story: SimpleNamespace) -> None:
    """API without data: own rollouts after the deadline."""
    assert {"local"} in sources(story.run)


def test_reset_by_anybody_is_survived(story: SimpleNamespace) -> None:
    """`/reset_data` by anybody: registers again."""
    assert len(registrations(story)) == 3, "at the start, after the reset, after the restart"


def test_run_goes_on_alone_without_an_api(story: SimpleNamespace) -> None:
    """API killed: own rollouts within the deadline + 5 s."""
    assert story.alone_after < OUTAGE + PATIENCE


def test_run_returns_to_an_api_that_is_back(story: SimpleNamespace) -> None:
    """API back: registers, returns to it."""
    by_step = sources(story.run)
    switches = [later for earlier, later in pairwise(by_step) if earlier != later]
    assert switches.count({"atropos"}) >= 4


def test_it_registers_again_with_the_step_it_has_trained(story: SimpleNamespace) -> None:
    """the same: `starting_step` = trained step."""
    steps = [body["starting_step"] for body in registrations(story)]
    assert steps[0] == 0
    assert 0 < steps[1] < steps[2]
    assert story.registered_at - 3 <= steps[2] <= story.registered_at


def test_sources_never_mix(story: SimpleNamespace) -> None:
    """sources: one in each step."""
    assert all(len(by_step) == 1 for by_step in sources(story.run))


def test_nothing_is_trained_twice(story: SimpleNamespace) -> None:
    """outages and resets: no group twice."""
    ids = [group[0].group_id for step in story.run.steps() for group in step.groups if group[0].source == "atropos"]
    assert len(ids) == len(set(ids)) == 2 * trainer.num_from_atropos(story.run.folder)


def test_get_requests_keep_their_bodies(story: SimpleNamespace) -> None:
    """`GET /status-env`: with its body."""
    asked = story.proxy.to("/status-env")
    assert asked and all("env_id" in json.loads(one.body) for one in asked)


def test_asked_to_stop_it_ends_cleanly(story: SimpleNamespace) -> None:
    """SIGTERM, API of others: stops after the step; no process left."""
    assert story.code == 0
    assert trainer.status(story.run.folder) == "stopped"
    assert story.left and len(story.family) > 1


def registrations(story: SimpleNamespace) -> list[dict[str, Any]]:
    """Those that reached the API."""
    return [json.loads(one.body) for one in story.proxy.to("/register", method="POST") if one.status == 200]
