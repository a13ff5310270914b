"""A sync moves every bit, and says so."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from atropos_exp.engine.client import EngineClient
from atropos_exp.types import SamplingParams
from atropos_exp.wire import EngineError
from atropos_exp.wire_tensors import digest

GREEDY = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, max_tokens=8, stop_token_ids=(), seed=0)


def test_tied_weights_arrive_bit_for_bit(tied_engine: EngineClient, helpers: Any) -> None:
    trainer = helpers.HeldModel(helpers.random_model(tied=True, seed=1))
    for bucket_bytes in (1, 40_000, 1 << 30):  # a tensor a bucket, some, all in one
        trainer.disturb()
        manager = helpers.manage(trainer, tied_engine, bucket_bytes=bucket_bytes)
        version = tied_engine.version() + 1
        stats = manager.publish(version)
        parameters = dict(trainer.model.named_parameters())
        assert "lm_head.weight" not in parameters
        assert tied_engine.digests() == {name: digest(tensor) for name, tensor in parameters.items()}
        assert stats.policy_version == version == tied_engine.version()
        assert stats.num_tensors == stats.digests_compared == len(parameters)
        assert stats.num_bytes == sum(tensor.numel() * 4 for tensor in parameters.values())
        assert stats.canary_gap_mean <= stats.canary_gap_max < 1e-5
        assert stats.seconds > 0 and stats.proof_seconds > 0
        assert manager.num_syncs == manager.num_verified == 1


def test_the_engine_samples_from_the_new_weights(tied_engine: EngineClient, helpers: Any) -> None:
    trainer = helpers.HeldModel(helpers.random_model(tied=True, seed=2))
    version = tied_engine.version() + 1
    helpers.manage(trainer, tied_engine).publish(version)
    prompt = np.array([3, 1, 4, 1, 5], dtype=np.int32)
    ((sample,),) = tied_engine.generate([prompt], GREEDY, num_samples=1)
    input_ids = torch.tensor(prompt[None, :].astype(np.int64))
    plain = trainer.model.generate(
        input_ids, attention_mask=torch.ones_like(input_ids), do_sample=False, max_new_tokens=8, pad_token_id=0
    )
    assert sample.token_ids.tolist() == plain[0, 5:].tolist()
    assert sample.policy_version == version


def test_a_tied_head_may_come_under_its_own_name_if_equal(tied_engine: EngineClient, helpers: Any) -> None:
    model = helpers.random_model(tied=True, seed=3)

    class WithHead(helpers.HeldModel):  # type: ignore[misc, name-defined]
        def parameters(self) -> Any:
            yield "lm_head.weight", model.lm_head.weight + self.offset
            yield from super().parameters()

    trainer = WithHead(model)
    trainer.offset = 0.0
    version = tied_engine.version() + 1
    stats = helpers.manage(trainer, tied_engine).publish(version)
    assert stats.num_tensors == stats.digests_compared + 1
    trainer.offset = 0.5
    with pytest.raises(EngineError, match=r"lm_head\.weight is tied to model\.embed_tokens\.weight"):
        helpers.manage(trainer, tied_engine).publish(version + 1)
    with pytest.raises(EngineError, match="weights incomplete: update to version"):
        tied_engine.check()
    trainer.offset = 0.0
    helpers.manage(trainer, tied_engine).publish(version + 1)  # a complete update makes it whole again
    tied_engine.check()


def test_requests_during_an_update_wait_for_its_weights(tied_engine: EngineClient, helpers: Any) -> None:
    trainer = helpers.HeldModel(helpers.random_model(tied=True, seed=5))
    version = tied_engine.version() + 1
    prompt = np.array([3, 1, 4], dtype=np.int32)
    with ThreadPoolExecutor(1) as background:
        with tied_engine.updating(version) as receiver:
            parameters = list(trainer.parameters())
            receiver.receive(parameters[:5])
            waiting = background.submit(tied_engine.generate, [prompt], GREEDY, num_samples=1)
            deadline = time.monotonic() + 60
            while tied_engine.info()["num_waiting"] == 0:
                assert time.monotonic() < deadline, "waited 60 s for the request to reach the server"
                time.sleep(0.02)
            assert not waiting.done()
            receiver.receive(parameters[5:])
        ((sample,),) = waiting.result(timeout=60)
    assert sample.policy_version == version
    (scored,) = trainer.logprobs([np.concatenate([prompt, sample.token_ids])], temperature=1.0)
    np.testing.assert_allclose(sample.logprobs, scored[len(prompt) - 1 :], atol=1e-5)


def test_versions_do_not_go_back(tied_engine: EngineClient, helpers: Any) -> None:
    trainer = helpers.HeldModel(helpers.random_model(tied=True, seed=4))
    version = tied_engine.version() + 5
    helpers.manage(trainer, tied_engine).publish(version)
    with pytest.raises(EngineError, match=f"version {version} is already served"):
        helpers.manage(trainer, tied_engine).publish(version - 1)
    helpers.manage(trainer, tied_engine).publish(version)  # the same version again is fine, as after a restart
    tied_engine.check()


def test_untied_bfloat16_weights_over_disk(tmp_path: Path, helpers: Any) -> None:
    """The cast happens at the sender: the engine holds exactly the rounded weights of the trainer."""
    trainer = helpers.HeldModel(helpers.random_model(tied=False, seed=1))
    engine = helpers.start(tmp_path, helpers.random_model(tied=False, seed=0), dtype="bfloat16", transport="disk")
    try:
        assert engine.dtype == "bfloat16"
        stats = helpers.manage(trainer, engine, tolerance=None).publish(1)
        parameters = dict(trainer.model.named_parameters())
        assert "lm_head.weight" in parameters
        assert engine.digests() == {name: digest(tensor.bfloat16()) for name, tensor in parameters.items()}
        assert stats.num_bytes == sum(tensor.numel() * 2 for tensor in parameters.values())
        assert 1e-5 < stats.canary_gap_max < 0.2
    finally:
        engine.stop()
    assert {path.name for path in tmp_path.iterdir()} == {"model", "engine.log"}
