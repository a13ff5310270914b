"""A server that dies or hangs is started anew and synced again, and what it was asked is asked once more."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atropos_exp.assembly.resync import Resync, ResyncedEvaluator, ResyncedSource
from atropos_exp.errors import EngineError, EngineLost
from atropos_exp.processes.ranks import Ranks
from atropos_exp.types import SamplingParams
from tests.helpers.processes import wait_until
from tests.helpers.publishing import HeldModel, manage
from tests.helpers.random_models import random_model

GREEDY = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, max_tokens=8, stop_token_ids=(), seed=0)
PROMPT = np.array([3, 1, 4, 1, 5], dtype=np.int32)
ALONE = Ranks(rank=0, world_size=1)


class CountingSource:
    """A `RolloutSource` whose groups are what the engine samples, and that counts its own calls."""

    def __init__(self, engine: Any, before: Any) -> None:
        self.engine, self.before, self.position = engine, before, 0

    def take(self, num_groups: int, *, step: int) -> Any:
        self.position += num_groups
        self.before()
        return self.engine.generate([PROMPT], GREEDY, num_samples=1), self.position

    def counters(self) -> dict[str, float]:
        return {}

    def state(self) -> dict[str, int]:
        return {"position": self.position}

    def restore(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Once:
    """Does something to the server, the first time."""

    def __init__(self, engine: Any, number: int) -> None:
        self.engine, self.number, self.done = engine, number, False

    def __call__(self) -> None:
        if not self.done:
            self.done = True
            os.kill(self.engine.replicas[0].process.pid, self.number)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_engine_samples_from_the_published_weights_again(tmp_path: Path, start: Any, number: int) -> None:
    engine = start(tmp_path, random_model(seed=0), health_timeout_seconds=3.0)
    try:
        trainer = HeldModel(random_model(seed=1))
        publisher = manage(trainer, engine)
        resync = Resync(publisher, engine, ALONE, max_restarts=2)
        resync.publish(3)
        ((before,),) = engine.generate([PROMPT], GREEDY, num_samples=1)
        first, address = engine.replicas[0].process.pid, engine.replicas[0].process.address

        source = ResyncedSource(CountingSource(engine, Once(engine, number)), resync)
        (((sample,),), position) = source.take(4, step=4)
        assert position == 4, "the step was undone before it was sampled again"
        assert engine.replicas[0].process.pid != first and engine.replicas[0].process.address == address
        assert sample.token_ids.tolist() == before.token_ids.tolist() and sample.policy_version == 3
        assert source.counters() == {"engine/restarts": 1}
        assert publisher.num_syncs == publisher.num_verified == 2

        evaluate = ResyncedEvaluator(lambda version: {"x": float(engine.version())}, resync)
        os.kill(engine.replicas[0].process.pid, number)
        assert evaluate(3) == {"x": 3.0}
        os.kill(engine.replicas[0].process.pid, number)
        with pytest.raises(EngineLost) as raised:  # the third time, of two
            source.take(4, step=5)
        assert "started anew 2 times (engine.max_restarts)" in raised.value.__notes__[0]
    finally:
        engine.stop()


@pytest.mark.slow
def test_a_new_server_refuses_until_a_sync_is_whole(tmp_path: Path, start: Any) -> None:
    """Also one that takes the place of a server that was lost under that sync."""
    engine = start(tmp_path, random_model(seed=0))
    try:
        engine.restart()
        for refused in (engine.check, lambda: engine.generate([PROMPT], GREEDY, num_samples=1)):
            with pytest.raises(EngineError, match="weights incomplete: the engine was started anew and not synced yet"):
                refused()
        kill = Once(engine, signal.SIGKILL)

        class Kills(HeldModel):
            def parameters(self) -> Any:
                for index, pair in enumerate(super().parameters()):
                    if index == 5:
                        kill()
                    yield pair

        trainer = Kills(random_model(seed=1))
        resync = Resync(manage(trainer, engine, bucket_bytes=1), engine, ALONE, max_restarts=1)
        assert resync.publish(7).policy_version == 7
        assert (resync.num_restarts, resync.num_syncs, resync.num_verified) == (1, 2, 1)
        engine.check()
    finally:
        engine.stop()


@pytest.mark.slow
def test_an_engine_whose_guard_is_killed_is_replaced_at_its_address(tmp_path: Path, start: Any) -> None:
    engine = start(tmp_path, random_model(seed=0))
    try:
        resync = Resync(manage(HeldModel(random_model(seed=1)), engine), engine, ALONE, max_restarts=1)
        resync.publish(1)
        server = engine.replicas[0].process
        address = server.address
        os.kill(parent(server.pid), signal.SIGKILL)
        assert resync.publish(2).policy_version == 2
        assert (server.address, server.num_restarts) == (address, 1)
        engine.check()
    finally:
        engine.stop()


@pytest.mark.slow
def test_an_engine_that_is_killed_while_it_starts_is_started_anew(tmp_path: Path, start: Any) -> None:
    engine = start(tmp_path, random_model(seed=0), max_restarts=3)
    server = engine.replicas[0].process
    try:
        killer = threading.Thread(target=kill_next, args=(engine, server.pid, 1))
        killer.start()
        engine.restart()
        killer.join()
        assert server.num_restarts == 2
        killer = threading.Thread(target=kill_next, args=(engine, server.pid, 1))
        killer.start()
        with pytest.raises(EngineLost, match=r"did not start: its process was killed by SIGKILL"):
            engine.restart()
        killer.join()
        assert server.num_restarts == 3
    finally:
        engine.stop()


def kill_next(engine: Any, last: int, times: int) -> None:
    """Kill the server that comes after the process `last`, as soon as it is there, and so on."""
    server = engine.replicas[0].process
    for _ in range(times):
        wait_until(lambda last=last: server.pid != last, "the next server", 60)
        last = server.pid
        os.kill(last, signal.SIGKILL)


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_other_failures_are_not_retried() -> None:
    calls = []

    def work() -> None:
        calls.append(1)
        raise ValueError("of another kind")

    with pytest.raises(ValueError, match="of another kind"):
        Resync(None, None, ALONE, max_restarts=5).through(work)  # type: ignore[arg-type]
    assert calls == [1]
