"""What the engine holds is compared once more before it changes, and a server that was started anew is not blamed."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from atropos_exp.assembly.resync import Resync
from atropos_exp.errors import WrongSampler
from atropos_exp.parts.engine.servers import Servers
from atropos_exp.processes.ranks import Ranks
from tests.helpers.faulty_lines import SQUARE
from tests.helpers.publishing import HeldModel, manage
from tests.helpers.random_models import random_model


def overwrite(engine: Servers, trainer: HeldModel, version: int) -> None:
    """One element of one tensor, in the engine alone."""
    with engine.updating(version) as receiver:
        for name, tensor in trainer.parameters():
            changed = tensor.detach().clone()
            if name == SQUARE:
                changed[3, 5] += 1e-3
            receiver.receive([(name, changed)])


@pytest.mark.parametrize("wanted", [True, False, "auto"])
def test_one_element_that_changed_after_the_proof_is_named(wanted: Any, engine: Servers) -> None:
    trainer, version = HeldModel(random_model(seed=3)), engine.version() + 1
    publisher, condemned = manage(trainer, engine, recheck=wanted), []
    resync = Resync(publisher, engine, Ranks(rank=0, world_size=1), max_restarts=0, condemn=condemned.append)
    resync.publish(version)
    assert resync.publish(version + 1).seconds_by_part["recheck"] >= 0.0, "nothing has changed"
    overwrite(engine, trainer, version + 1)
    trainer.disturb(0.01)
    if wanted is False:
        resync.publish(version + 2)
        return
    if wanted == "auto":
        publisher._recheck._since -= 100.0  # a step that takes so long can afford it
    with pytest.raises(WrongSampler, match=rf"step {version + 2}: .* {SQUARE} changed after the proof \(1 of \d+"):
        resync.publish(version + 2)
    assert condemned == [version + 2]
    assert (publisher.num_syncs, publisher.num_verified) == (2, 2), "the sync itself was right"
    resync.publish(version + 2)  # once is enough: whoever goes on does so with new weights


def test_where_digests_take_long_they_are_left_out(engine: Servers) -> None:
    publisher = manage(HeldModel(random_model(seed=3)), engine, recheck="auto")
    publisher.publish(engine.version() + 1)
    overwrite(engine, HeldModel(random_model(seed=4)), engine.version())
    publisher._recheck._seconds = 1e6
    publisher.recheck(before=engine.version() + 1)


def test_before_it_sleeps_it_is_asked_too(engine: Servers) -> None:
    trainer, version = HeldModel(random_model(seed=3)), engine.version() + 1
    resync = Resync(manage(trainer, engine, recheck=True), engine, Ranks(rank=0, world_size=1), max_restarts=0)
    resync.publish(version)
    overwrite(engine, trainer, version)
    with pytest.raises(WrongSampler, match=SQUARE):
        resync.sleep()


@pytest.mark.slow
def test_a_server_that_was_started_anew_is_not_blamed(tmp_path: Path, start: Any) -> None:
    """It serves what its folder holds until it is synced again, under the same version."""
    engine = start(tmp_path, random_model(seed=0))
    try:
        trainer = HeldModel(random_model(seed=1))
        resync = Resync(manage(trainer, engine, recheck=True), engine, Ranks(rank=0, world_size=1), max_restarts=2)
        resync.publish(1)
        os.kill(engine.replicas[0].process.pid, signal.SIGKILL)
        resync.on_zero(engine.check)  # while it samples
        assert resync.num_repeated == 1
        resync.publish(2)
        os.kill(engine.replicas[0].process.pid, signal.SIGKILL)
        with torch.no_grad():
            trainer.disturb()
        resync.publish(3)  # the question itself finds it dead
        assert (resync.num_restarts, engine.version()) == (2, 3)
    finally:
        engine.stop()
