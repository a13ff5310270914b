"""New weights reach vLLM whole, and it samples from them and from nothing older."""

from __future__ import annotations

import pytest

from atropos_exp.parts.engine.servers import Servers
from tests.helpers.publishing import HeldModel, manage
from tests.helpers.random_models import random_model
from tests.helpers.sync_contract import SyncContract, check_no_older_key_is_read

pytestmark = pytest.mark.vllm


class TestSync(SyncContract):
    tolerance = 1e-4


def test_what_can_be_read_back_is(engine: Servers) -> None:
    """Embedding, norms and biases; vLLM keeps CPU matrices repacked only, so their digests are of the arrival."""
    trainer = HeldModel(random_model(seed=1))
    manage(trainer, engine).publish(engine.version() + 1)
    names = set(engine.replicas[0].digests())
    assert names == {name for name, _ in trainer.parameters()}
    matrices = sum(name.endswith("proj.weight") for name in names)
    assert engine.replicas[0].info()["num_resident_digests"] == len(names) - matrices > 0


def test_no_key_or_value_of_older_weights_is_read(engine: Servers) -> None:
    before, after = check_no_older_key_is_read(engine)
    assert before["num_cached_tokens"] > 0, "the cache was in use"
    assert after["num_cached_tokens"] == before["num_cached_tokens"]
