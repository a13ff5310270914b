"""Faults put between trainer and engine, and the engine's death under a sync."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from atropos_exp.errors import EngineError
from tests.helpers.fault_contract import FaultContract
from tests.helpers.faulty_lines import BreaksHalfWay, Bucket
from tests.helpers.publishing import HeldModel, manage
from tests.helpers.random_models import random_model


class TestFaults(FaultContract):
    loss = "the engine holds other bits than were sent of"


@pytest.mark.slow
def test_a_server_killed_half_way(tmp_path: Path, start: Any) -> None:
    engine = start(tmp_path, random_model(seed=0))
    trainer = HeldModel(random_model(seed=7))

    class KillsHalfWay(BreaksHalfWay):
        def receive(self, bucket: Bucket) -> None:
            if self.num_left == 0:
                os.kill(engine.replicas[0].process.pid, signal.SIGKILL)
                self.num_left = 1000
            super().receive(bucket)

    try:
        with pytest.raises(EngineError, match=r"waited for version 1: .* to be loaded; .*killed by SIGKILL") as raised:
            manage(trainer, KillsHalfWay(engine), bucket_bytes=1).publish(1)
        assert "while giving the update up" in raised.value.__notes__[0]
        assert trainer.num_given == len(list(trainer.model.parameters()))
    finally:
        engine.stop()
