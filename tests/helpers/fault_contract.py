"""Faults put between trainer and engine: each is caught, named, and leaves the engine refusing to sample."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from atropos_exp.errors import EngineError, SyncError
from atropos_exp.parts.engine.servers import Servers
from tests.helpers.faulty_lines import (
    SQUARE,
    BreaksHalfWay,
    DeliversOld,
    DeliversOldAndCannotTell,
    FaultyLine,
    LosesOne,
    TransposesOne,
)
from tests.helpers.publishing import CANARY, HeldModel, manage
from tests.helpers.random_models import random_model


def assert_refuses_then_recovers(engine: Servers, trainer: HeldModel, version: int) -> None:
    for refused in (engine.check, lambda: engine.score(CANARY, temperature=1.0)):
        with pytest.raises(EngineError, match=f"answered 409: weights incomplete: update to version {version} interr"):
            refused()
    manage(trainer, engine).publish(version)
    engine.check()


@contextmanager
def holding_nan(trainer: HeldModel) -> Iterator[None]:
    final_norm = trainer.model.model.norm.weight
    healthy = final_norm.detach().clone()
    with torch.no_grad():
        final_norm[0] = float("nan")
        try:
            yield
        finally:
            final_norm.copy_(healthy)


class FaultContract:
    """With a fixture `engine` over a tied float32 model."""

    loss: str  # what is said of a tensor that was lost on the line

    @pytest.fixture
    def trainer(self) -> HeldModel:
        return HeldModel(random_model(seed=7))

    def test_a_skipped_tensor(self, engine: Servers, trainer: HeldModel) -> None:
        """Lost on the line (only the engine's digests know), and never given by the trainer."""
        version = engine.version() + 1
        with pytest.raises(SyncError, match=f"{self.loss} {SQUARE}"):
            manage(trainer, LosesOne(engine), bucket_bytes=1).publish(version)
        assert_refuses_then_recovers(engine, trainer, version)

        class Forgets(HeldModel):
            def parameters(self) -> Any:
                return (pair for pair in super().parameters() if pair[0] != SQUARE)

        with pytest.raises(SyncError, match=rf"{SQUARE} of \d+ tensors never sent to the engine"):
            manage(Forgets(trainer.model), engine).publish(version + 1)
        assert_refuses_then_recovers(engine, trainer, version + 1)

    def test_the_engine_itself_misses_a_skipped_tensor(self, engine: Servers, trainer: HeldModel) -> None:
        version = engine.version() + 1
        with (
            pytest.raises(EngineError, match=rf"update to version {version} misses {SQUARE} of \d+ tensors"),
            engine.updating(version) as receiver,
        ):
            receiver.receive([(name, tensor) for name, tensor in trainer.parameters() if name != SQUARE])
        assert_refuses_then_recovers(engine, trainer, version)

    def test_a_transposed_tensor(self, engine: Servers, trainer: HeldModel) -> None:
        """On the line the digest names it. In the trainer's hands, before any digest, the canary sees it."""
        assert len(set(trainer.model.get_parameter(SQUARE).shape)) == 1
        version = engine.version() + 1
        with pytest.raises(SyncError, match=rf"other bits than were sent of {SQUARE} \(1 tensors differ\)"):
            manage(trainer, TransposesOne(engine)).publish(version)
        assert_refuses_then_recovers(engine, trainer, version)

        class Transposes(HeldModel):
            def parameters(self) -> Any:
                return ((name, tensor.T if name == SQUARE else tensor) for name, tensor in super().parameters())

        with pytest.raises(SyncError, match=r"canary prompt \d, token \d+: the engine gives -.* and the trainer -"):
            manage(Transposes(trainer.model), engine).publish(version + 1)
        assert_refuses_then_recovers(engine, trainer, version + 1)

    def test_stale_weights_under_a_new_version(self, engine: Servers, trainer: HeldModel) -> None:
        manage(trainer, engine).publish(engine.version() + 1)
        stale = DeliversOld(engine, trainer.model)
        trainer.disturb()
        version = engine.version() + 1
        with pytest.raises(SyncError, match=r"the engine holds other bits than were sent of .* and \d+ more"):
            manage(trainer, stale).publish(version)
        assert_refuses_then_recovers(engine, trainer, version)

    def test_the_canary_alone_catches_stale_weights(self, engine: Servers, trainer: HeldModel) -> None:
        """With an engine that accepts everything, counts a version up and cannot give digests."""
        manage(trainer, engine).publish(engine.version() + 1)
        stale = DeliversOldAndCannotTell(engine, trainer.model)
        version = engine.version() + 1
        assert manage(trainer, stale).publish(version).digests_compared == 0  # not stale yet: the same weights
        trainer.disturb(0.01)
        said = f"canary prompt .* after the sync to version {version + 1}; .*does not serve"
        with pytest.raises(SyncError, match=said):
            manage(trainer, stale).publish(version + 1)
        assert_refuses_then_recovers(engine, trainer, version + 1)

    def test_a_version_that_did_not_change(self, engine: Servers, trainer: HeldModel) -> None:
        line: Any = FaultyLine(engine)
        version = engine.version() + 1
        line.version = lambda: version - 1
        with pytest.raises(SyncError, match=f"serves version {version - 1} after the sync to version {version}"):
            manage(trainer, line).publish(version)
        assert_refuses_then_recovers(engine, trainer, version)

    def test_an_interruption_half_way(self, engine: Servers, trainer: HeldModel) -> None:
        version = engine.version() + 1
        with pytest.raises(ConnectionError, match="the line is cut"):
            manage(trainer, BreaksHalfWay(engine), bucket_bytes=1).publish(version)
        # The gathering is collective: the other ranks need this one to consume all of it.
        num_tensors = len(list(trainer.model.parameters()))
        assert trainer.num_given == num_tensors
        with pytest.raises(EngineError, match=f"version {version} interrupted after 3 of {num_tensors} tensors"):
            engine.check()
        assert_refuses_then_recovers(engine, trainer, version)

    def test_a_weight_that_is_not_finite(self, engine: Servers, trainer: HeldModel) -> None:
        """In the trainer, and on the way from it."""
        version = engine.version() + 1
        with (
            holding_nan(trainer),
            pytest.raises(SyncError, match="a logprob is not finite in the trainer itself"),
        ):
            manage(trainer, engine).publish(version)
        assert_refuses_then_recovers(engine, trainer, version)

        class Spoils(HeldModel):
            def parameters(self) -> Any:
                for name, tensor in super().parameters():  # after the last key and value, which vLLM would keep
                    yield name, tensor * float("nan") if name == "model.norm.weight" else tensor

        with pytest.raises(SyncError, match=r"a logprob is not finite \(trainer \[-"):
            manage(Spoils(trainer.model), engine).publish(version + 1)
        assert_refuses_then_recovers(engine, trainer, version + 1)
