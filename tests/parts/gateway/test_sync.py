"""No environment gets a token between the start of a weight sync and its proof."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from atropos_exp.assembly.resync import Resync
from atropos_exp.errors import SyncError
from atropos_exp.parts.engine.servers import Servers
from atropos_exp.parts.gateway.client import GatewayClient
from atropos_exp.processes.ranks import Ranks
from tests.helpers.publishing import HeldModel, manage


@pytest.fixture
def engine(helpers: Any, tmp_path: Path) -> Iterator[Servers]:
    client = helpers.start_engine(tmp_path)
    yield client
    client.stop()


@pytest.fixture
def gateway(engine: Servers, helpers: Any, tmp_path: Path) -> Iterator[GatewayClient]:
    client = helpers.start_gateway(engine.endpoint, tmp_path)
    yield client
    client.stop()


def test_requests_wait_until_a_sync_is_proven(gateway: GatewayClient, engine: Servers, helpers: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    held: list[float] = []

    class Asks(HeldModel):
        doubt = 0.0

        def logprobs(self, sequences: Any, *, temperature: float) -> Any:
            held.append(gateway.counters()["holding"])  # the engine serves the new weights already
            return [found + self.doubt for found in super().logprobs(sequences, temperature=temperature)]

    trainer = Asks(AutoModelForCausalLM.from_pretrained(helpers.weights, dtype=torch.float32))
    publisher = manage(trainer, engine)
    resync = Resync(publisher, engine, Ranks(rank=0, world_size=1), max_restarts=0, gate=gateway)
    version = engine.version()
    resync.publish(version + 1)
    assert held == [1] and gateway.counters()["holding"] == 0
    trainer.doubt = 0.1
    with pytest.raises(SyncError, match="The engine does not serve the trainer's weights"):
        resync.publish(version + 2)
    assert held == [1, 1] and gateway.counters()["holding"] == 1
    trainer.doubt = 0.0
    resync.publish(version + 3)
    assert gateway.counters()["holding"] == 0
    engine.check()
