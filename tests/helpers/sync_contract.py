"""What a sync does, whichever engine it is to: new weights arrive whole, and it samples from them."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atropos_exp.errors import EngineError
from atropos_exp.parts.engine.servers import Servers
from atropos_exp.types import SamplingParams
from atropos_exp.weights.digest import digest
from tests.helpers.publishing import HeldModel, manage
from tests.helpers.random_models import completion_logprobs, greedy_tokens, random_model, random_prompts

GREEDY = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, max_tokens=8, stop_token_ids=(), seed=0)
PROMPT = np.array([3, 1, 4, 1, 5], dtype=np.int32)


class SyncContract:
    """With a fixture `engine` over a tied float32 model, and `start(folder, model, **settings)` for others."""

    tolerance: float  # nats, of a logprob

    def test_tied_weights_arrive_bit_for_bit(self, engine: Servers) -> None:
        trainer = HeldModel(random_model(seed=1))
        for bucket_bytes in (1, 40_000, 1 << 30):  # a tensor a bucket, some, all in one
            trainer.disturb()
            manager = manage(trainer, engine, bucket_bytes=bucket_bytes)
            version = engine.version() + 1
            stats = manager.publish(version)
            parameters = dict(trainer.model.named_parameters())
            assert "lm_head.weight" not in parameters
            assert engine.replicas[0].digests() == {name: digest(tensor) for name, tensor in parameters.items()}
            assert stats.policy_version == version == engine.version()
            assert stats.num_tensors == stats.digests_compared == len(parameters)
            assert stats.num_bytes == sum(tensor.numel() * 4 for tensor in parameters.values())
            assert stats.canary_gap_mean <= stats.canary_gap_max < self.tolerance
            assert stats.seconds > 0 and stats.proof_seconds > 0
            assert manager.num_syncs == manager.num_verified == 1

    def test_the_engine_samples_from_the_new_weights(self, engine: Servers) -> None:
        trainer = HeldModel(random_model(seed=2))
        version = engine.version() + 1
        manage(trainer, engine).publish(version)
        ((sample,),) = engine.generate([PROMPT], GREEDY, num_samples=1)
        assert sample.token_ids.tolist() == greedy_tokens(trainer.model, PROMPT, GREEDY.max_tokens)
        assert sample.policy_version == version

    def test_a_tied_head_may_come_under_its_own_name_if_equal(self, engine: Servers) -> None:
        check_tied_head_under_its_own_name(engine)

    def test_requests_during_an_update_wait_for_its_weights(self, engine: Servers) -> None:
        trainer = HeldModel(random_model(seed=5))
        version = engine.version() + 1
        with ThreadPoolExecutor(1) as background:
            with engine.updating(version) as receiver:
                parameters = list(trainer.parameters())
                receiver.receive(parameters[:5])
                waiting = background.submit(engine.generate, [PROMPT], GREEDY, num_samples=1)
                deadline = time.monotonic() + 60
                while engine.replicas[0].info()["num_waiting"] == 0:
                    assert time.monotonic() < deadline, "waited 60 s for the request to reach the server"
                    time.sleep(0.02)
                assert not waiting.done()
                receiver.receive(parameters[5:])
            ((sample,),) = waiting.result(timeout=60)
        assert sample.policy_version == version
        expected = completion_logprobs(trainer.model, PROMPT, sample.token_ids)
        np.testing.assert_allclose(sample.logprobs, expected, atol=self.tolerance)

    def test_versions_do_not_go_back(self, engine: Servers) -> None:
        trainer = HeldModel(random_model(seed=4))
        version = engine.version() + 5
        manage(trainer, engine).publish(version)
        with pytest.raises(EngineError, match=f"version {version} is already served"):
            manage(trainer, engine).publish(version - 1)
        manage(trainer, engine).publish(version)  # the same version again is fine, as after a restart
        engine.check()

    def test_untied_bfloat16_weights_over_disk(self, tmp_path: Path, start: Any) -> None:
        """The cast happens at the sender: the engine holds exactly the rounded weights of the trainer."""
        trainer = HeldModel(random_model(tied=False, seed=1))
        engine = start(tmp_path, random_model(tied=False, seed=0), dtype="bfloat16", transport="disk")
        try:
            assert engine.dtype == "bfloat16"
            stats = manage(trainer, engine, tolerance=None).publish(1)
            parameters = dict(trainer.model.named_parameters())
            assert "lm_head.weight" in parameters
            assert engine.replicas[0].digests() == {
                name: digest(tensor.bfloat16()) for name, tensor in parameters.items()
            }
            assert stats.num_bytes == sum(tensor.numel() * 2 for tensor in parameters.values())
            assert 1e-5 < stats.canary_gap_max < 0.2
            trainer.disturb()
            assert manage(trainer, engine, tolerance=None).publish(2).canary_gap_max < 0.2
        finally:
            engine.stop()
        assert {path.name for path in tmp_path.iterdir()} == {"model", "engine.log"}


def check_tied_head_under_its_own_name(engine: Servers) -> None:
    model = random_model(seed=3)

    class WithHead(HeldModel):
        offset = 0.0

        def parameters(self) -> Any:
            yield "lm_head.weight", model.lm_head.weight + self.offset
            yield from super().parameters()

    trainer = WithHead(model)
    version = engine.version() + 1
    stats = manage(trainer, engine).publish(version)
    assert stats.num_tensors == stats.digests_compared + 1
    trainer.offset = 0.5
    with pytest.raises(EngineError, match=r"lm_head\.weight is tied to model\.embed_tokens\.weight"):
        manage(trainer, engine).publish(version + 1)
    with pytest.raises(EngineError, match="weights incomplete: update to version"):
        engine.check()
    trainer.offset = 0.0
    manage(trainer, engine).publish(version + 1)  # a complete update makes it whole again
    engine.check()


def check_no_older_key_is_read(engine: Servers) -> tuple[dict[str, Any], dict[str, Any]]:
    """A prompt is in the prefix cache when the weights change. What the engine said of itself before and after."""
    (prompt,) = random_prompts([280], seed=21)
    trainer = HeldModel(random_model(seed=2))
    manage(trainer, engine).publish(engine.version() + 1)
    for _ in range(2):
        ((old,),) = engine.generate([prompt], GREEDY, num_samples=1)
    trainer.disturb(0.1)
    before = engine.replicas[0].info()
    manage(trainer, engine).publish(engine.version() + 1)
    ((new,),) = engine.generate([prompt], GREEDY, num_samples=1)
    after = engine.replicas[0].info()
    assert after["num_cache_proofs"] == before["num_cache_proofs"] + 1
    expected = completion_logprobs(trainer.model, prompt, new.token_ids)
    np.testing.assert_allclose(new.logprobs, expected, atol=1e-4)
    assert np.abs(old.logprobs[0] - new.logprobs[0]) > 1e-2, "the weights did change what is said"
    return before, after
