"""New weights reach vLLM whole, and it samples from them and from nothing older."""

from __future__ import annotations

import numpy as np
import pytest
from publishing import HeldModel, manage
from random_models import completion_logprobs, random_model, random_prompts
from sync_contract import GREEDY, SyncContract

from atropos_exp.engine.client import EngineClient

pytestmark = pytest.mark.vllm


class TestSync(SyncContract):
    tolerance = 1e-4


def test_what_can_be_read_back_is(engine: EngineClient) -> None:
    """Embedding, norms and biases; vLLM keeps CPU matrices repacked only, so their digests are of the arrival."""
    trainer = HeldModel(random_model(seed=1))
    manage(trainer, engine).publish(engine.version() + 1)
    names = set(engine.digests())
    assert names == {name for name, _ in trainer.parameters()}
    matrices = sum(name.endswith("proj.weight") for name in names)
    assert engine.info()["num_resident_digests"] == len(names) - matrices > 0


def test_no_key_or_value_of_older_weights_is_read(engine: EngineClient) -> None:
    """The prompt is in the prefix cache when the weights change."""
    (prompt,) = random_prompts([280], seed=21)
    trainer = HeldModel(random_model(seed=2))
    manage(trainer, engine).publish(engine.version() + 1)
    for _ in range(2):
        ((old,),) = engine.generate([prompt], GREEDY, num_samples=1)
    trainer.disturb(0.1)
    before = engine.info()
    assert before["num_cached_tokens"] > 0, "the cache was in use"
    manage(trainer, engine).publish(engine.version() + 1)
    ((new,),) = engine.generate([prompt], GREEDY, num_samples=1)
    after = engine.info()
    assert after["num_cached_tokens"] == before["num_cached_tokens"]
    assert after["num_cache_proofs"] == before["num_cache_proofs"] + 1
    expected = completion_logprobs(trainer.model, prompt, new.token_ids)
    np.testing.assert_allclose(new.logprobs, expected, atol=1e-4)
    assert np.abs(old.logprobs[0] - new.logprobs[0]) > 1e-2, "the weights did change what is said"
