"""New weights reach vLLM whole, and it samples from them and from nothing older."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atropos_exp.engine.client import EngineClient
from atropos_exp.types import SamplingParams
from atropos_exp.wire import EngineError
from atropos_exp.wire_tensors import digest

pytestmark = pytest.mark.vllm

GREEDY = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, max_tokens=8, stop_token_ids=(), seed=0)


def test_tied_weights_arrive_and_are_used(engine: EngineClient, helpers: Any) -> None:
    trainer = helpers.HeldModel(helpers.random_model(tied=True, seed=1))
    for bucket_bytes in (1, 40_000, 1 << 30):  # a tensor a bucket, some, all in one
        trainer.disturb()
        manager = helpers.manage(trainer, engine, bucket_bytes=bucket_bytes)
        version = engine.version() + 1
        stats = manager.publish(version)
        parameters = dict(trainer.model.named_parameters())
        assert "lm_head.weight" not in parameters
        assert engine.digests() == {name: digest(tensor) for name, tensor in parameters.items()}
        assert stats.policy_version == version == engine.version()
        assert stats.num_tensors == stats.digests_compared == len(parameters)
        assert stats.num_bytes == sum(tensor.numel() * 4 for tensor in parameters.values())
        assert stats.canary_gap_mean <= stats.canary_gap_max < 1e-4
        assert manager.num_syncs == manager.num_verified == 1
    # Embedding, norms and biases can be read back; vLLM keeps CPU matrices repacked only, so theirs is of the arrival.
    matrices = sum(name.endswith("proj.weight") for name in parameters)
    assert engine.info()["num_resident_digests"] == len(parameters) - matrices > 0


def test_no_key_or_value_of_older_weights_is_read(engine: EngineClient, helpers: Any) -> None:
    """The prompt is in the prefix cache when the weights change."""
    (prompt,) = helpers.prompts([280], seed=21)
    trainer = helpers.HeldModel(helpers.random_model(tied=True, seed=2))
    helpers.manage(trainer, engine).publish(engine.version() + 1)
    for _ in range(2):
        ((old,),) = engine.generate([prompt], GREEDY, num_samples=1)
    trainer.disturb(0.1)
    before = engine.info()
    assert before["num_cached_tokens"] > 0, "the cache was in use"
    helpers.manage(trainer, engine).publish(engine.version() + 1)
    ((new,),) = engine.generate([prompt], GREEDY, num_samples=1)
    after = engine.info()
    assert after["num_cached_tokens"] == before["num_cached_tokens"]
    assert after["num_cache_proofs"] == before["num_cache_proofs"] + 1
    expected = helpers.logprobs(trainer.model, prompt, new.token_ids, 1.0)
    np.testing.assert_allclose(new.logprobs, expected, atol=1e-4)
    assert np.abs(old.logprobs[0] - new.logprobs[0]) > 1e-2, "the weights did change what is said"


def test_a_tied_head_may_come_under_its_own_name_if_equal(engine: EngineClient, helpers: Any) -> None:
    model = helpers.random_model(tied=True, seed=3)

    class WithHead(helpers.HeldModel):  # type: ignore[misc, name-defined]
        def parameters(self) -> Any:
            yield "lm_head.weight", model.lm_head.weight + self.offset
            yield from super().parameters()

    trainer = WithHead(model)
    trainer.offset = 0.0
    version = engine.version() + 1
    stats = helpers.manage(trainer, engine).publish(version)
    assert stats.num_tensors == stats.digests_compared + 1
    trainer.offset = 0.5
    with pytest.raises(EngineError, match=r"lm_head\.weight is tied to model\.embed_tokens\.weight"):
        helpers.manage(trainer, engine).publish(version + 1)
    with pytest.raises(EngineError, match="weights incomplete: update to version"):
        engine.check()
    trainer.offset = 0.0
    helpers.manage(trainer, engine).publish(version + 1)
    engine.check()


def test_untied_weights_over_disk_in_bfloat16(tmp_path: Path, helpers: Any) -> None:
    trainer = helpers.HeldModel(helpers.random_model(tied=False, seed=1))
    engine = helpers.start(tmp_path, helpers.random_model(tied=False, seed=0), dtype="bfloat16", transport="disk")
    try:
        stats = helpers.manage(trainer, engine, tolerance=None).publish(1)
        parameters = dict(trainer.model.named_parameters())
        assert "lm_head.weight" in parameters
        assert engine.digests() == {name: digest(tensor.bfloat16()) for name, tensor in parameters.items()}
        assert stats.num_bytes == sum(tensor.numel() * 2 for tensor in parameters.values())
        assert 1e-5 < stats.canary_gap_max < 0.2
        trainer.disturb(0.2)
        assert helpers.manage(trainer, engine, tolerance=None).publish(2).canary_gap_max < 0.2
    finally:
        engine.stop()
    assert {path.name for path in tmp_path.iterdir()} == {"model", "engine.log"}
