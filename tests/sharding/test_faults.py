"""Faults put between trainer and engine: each is caught, named, and leaves the engine refusing to sample."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_lines import (
    SQUARE,
    BreaksHalfWay,
    Bucket,
    DeliversOld,
    DeliversOldAndCannotTell,
    FaultyLine,
    LosesOne,
    TransposesOne,
)

from atropos_exp.engine.client import EngineClient
from atropos_exp.sharding.proof import SyncError
from atropos_exp.wire import EngineError


@pytest.fixture
def trainer(helpers: Any) -> Any:
    return helpers.HeldModel(helpers.random_model(tied=True, seed=7))


def assert_refuses_then_recovers(engine: EngineClient, trainer: Any, helpers: Any, version: int) -> None:
    for refused in (engine.check, lambda: engine.score(helpers.canary, temperature=1.0)):
        with pytest.raises(EngineError, match=f"answered 409: weights incomplete: update to version {version} interr"):
            refused()
    helpers.manage(trainer, engine).publish(version)
    engine.check()


def test_a_skipped_tensor(tied_engine: EngineClient, trainer: Any, helpers: Any) -> None:
    """Lost on the line (only the engine's digests know), and never given by the trainer."""
    version = tied_engine.version() + 1
    with pytest.raises(SyncError, match=f"the engine holds other bits than were sent of {SQUARE} "):
        helpers.manage(trainer, LosesOne(tied_engine), bucket_bytes=1).publish(version)
    assert_refuses_then_recovers(tied_engine, trainer, helpers, version)

    class Forgets(helpers.HeldModel):  # type: ignore[misc, name-defined]
        def parameters(self) -> Any:
            return (pair for pair in super().parameters() if pair[0] != SQUARE)

    with pytest.raises(SyncError, match=rf"{SQUARE} of \d+ tensors never sent to the engine"):
        helpers.manage(Forgets(trainer.model), tied_engine).publish(version + 1)
    assert_refuses_then_recovers(tied_engine, trainer, helpers, version + 1)


def test_the_engine_itself_misses_a_skipped_tensor(tied_engine: EngineClient, trainer: Any) -> None:
    version = tied_engine.version() + 1
    with (
        pytest.raises(EngineError, match=rf"update to version {version} misses {SQUARE} of \d+ tensors"),
        tied_engine.updating(version) as receiver,
    ):
        receiver.receive([(name, tensor) for name, tensor in trainer.parameters() if name != SQUARE])
    with pytest.raises(EngineError, match="answered 409: weights incomplete"):
        tied_engine.check()


def test_a_transposed_tensor(tied_engine: EngineClient, trainer: Any, helpers: Any) -> None:
    """On the line the digests name it. In the trainer's hands, before any digest, the canary sees it."""
    assert len(set(trainer.model.get_parameter(SQUARE).shape)) == 1
    version = tied_engine.version() + 1
    with pytest.raises(SyncError, match=rf"other bits than were sent of {SQUARE} \(1 tensors differ\)"):
        helpers.manage(trainer, TransposesOne(tied_engine)).publish(version)
    assert_refuses_then_recovers(tied_engine, trainer, helpers, version)

    class Transposes(helpers.HeldModel):  # type: ignore[misc, name-defined]
        def parameters(self) -> Any:
            return ((name, tensor.T if name == SQUARE else tensor) for name, tensor in super().parameters())

    with pytest.raises(SyncError, match=r"canary prompt 0, token \d: the engine gives -.* and the trainer -"):
        helpers.manage(Transposes(trainer.model), tied_engine).publish(version + 1)
    assert_refuses_then_recovers(tied_engine, trainer, helpers, version + 1)


def test_stale_weights_under_a_new_version(tied_engine: EngineClient, trainer: Any, helpers: Any) -> None:
    helpers.manage(trainer, tied_engine).publish(tied_engine.version() + 1)
    stale = DeliversOld(tied_engine, trainer.model)
    trainer.disturb()
    version = tied_engine.version() + 1
    with pytest.raises(SyncError, match=r"the engine holds other bits than were sent of .* and \d+ more"):
        helpers.manage(trainer, stale).publish(version)
    assert_refuses_then_recovers(tied_engine, trainer, helpers, version)


def test_the_canary_alone_catches_stale_weights(tied_engine: EngineClient, trainer: Any, helpers: Any) -> None:
    """With an engine that accepts everything, counts a version up and cannot give digests."""
    helpers.manage(trainer, tied_engine).publish(tied_engine.version() + 1)
    stale = DeliversOldAndCannotTell(tied_engine, trainer.model)
    version = tied_engine.version() + 1
    assert helpers.manage(trainer, stale).publish(version).digests_compared == 0  # not stale yet: the same weights
    trainer.disturb(0.01)
    with pytest.raises(SyncError, match=f"canary prompt .* after the sync to version {version + 1}; .*does not serve"):
        helpers.manage(trainer, stale).publish(version + 1)
    assert_refuses_then_recovers(tied_engine, trainer, helpers, version + 1)


def test_a_version_that_did_not_change(tied_engine: EngineClient, trainer: Any, helpers: Any) -> None:
    faulty = FaultyLine(tied_engine)
    version = tied_engine.version() + 1
    faulty.version = lambda: version - 1
    with pytest.raises(SyncError, match=f"serves version {version - 1} after the sync to version {version}"):
        helpers.manage(trainer, faulty).publish(version)
    assert_refuses_then_recovers(tied_engine, trainer, helpers, version)


def test_an_interruption_half_way(tied_engine: EngineClient, trainer: Any, helpers: Any) -> None:
    version = tied_engine.version() + 1
    with pytest.raises(ConnectionError, match="the line is cut"):
        helpers.manage(trainer, BreaksHalfWay(tied_engine), bucket_bytes=1).publish(version)
    # The gathering is collective: the other ranks need this one to consume all of it.
    num_tensors = len(list(trainer.model.parameters()))
    assert trainer.num_given == num_tensors
    with pytest.raises(EngineError, match=f"version {version} interrupted after 3 of {num_tensors} tensors"):
        tied_engine.check()
    assert_refuses_then_recovers(tied_engine, trainer, helpers, version)


def test_a_weight_that_is_not_finite(tied_engine: EngineClient, trainer: Any, helpers: Any) -> None:
    version = tied_engine.version() + 1
    healthy = trainer.model.model.norm.weight.detach().clone()
    with torch.no_grad():
        trainer.model.model.norm.weight[0] = float("nan")
    with pytest.raises(SyncError, match="a logprob is not finite"):
        helpers.manage(trainer, tied_engine).publish(version)
    with torch.no_grad():
        trainer.model.model.norm.weight.copy_(healthy)
    assert_refuses_then_recovers(tied_engine, trainer, helpers, version)


def test_a_server_killed_half_way(tmp_path: Path, trainer: Any, helpers: Any) -> None:
    engine = helpers.start(tmp_path, helpers.random_model(tied=True, seed=0))

    class KillsHalfWay(BreaksHalfWay):
        def receive(self, bucket: Bucket) -> None:
            if self.num_left == 0:
                os.kill(engine.process.pid, signal.SIGKILL)
                self.num_left = 1000
            super().receive(bucket)

    try:
        with pytest.raises(EngineError, match=r"waited for version 1: .* to be loaded; .*killed by SIGKILL") as raised:
            helpers.manage(trainer, KillsHalfWay(engine), bucket_bytes=1).publish(1)
        assert "while giving the update up" in raised.value.__notes__[0]
        assert trainer.num_given == len(list(trainer.model.parameters()))
    finally:
        engine.stop()
