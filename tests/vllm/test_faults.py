"""Faults between trainer and vLLM, and inside it: each is caught and named, and the engine refuses to sample."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from atropos_exp.errors import EngineError, SyncError
from atropos_exp.parts.engine.servers import Servers
from atropos_exp.types import SamplingParams
from tests.helpers.fault_contract import FaultContract, assert_refuses_then_recovers
from tests.helpers.publishing import HeldModel, manage
from tests.helpers.random_models import completion_logprobs, random_prompts

pytestmark = pytest.mark.vllm

GREEDY = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, max_tokens=4, stop_token_ids=(), seed=0)


class TestFaults(FaultContract):
    loss = "the engine gave no digest of"

    def test_a_tied_head_that_stays_stale(self, engine: Servers, faults: Path, trainer: HeldModel) -> None:
        """vLLM's CPU head computes with a packed copy of the embedding. Unless it is loaded too, every digest is right,
        the version counts up, and the logprobs are those of another model: the canary alone sees it."""
        manage(trainer, engine).publish(engine.version() + 1)
        version = engine.version() + 1
        (faults / "forgets_head").touch()
        try:
            trainer.disturb()
            with pytest.raises(SyncError, match=rf"canary prompt \d.* the sync to version {version}; .*not serve"):
                manage(trainer, engine).publish(version)
        finally:
            (faults / "forgets_head").unlink()
        assert_refuses_then_recovers(engine, trainer, version)

    def test_a_prefix_cache_that_is_not_emptied(self, engine: Servers, faults: Path, trainer: HeldModel) -> None:
        """The server finds its own prompt in the cache and refuses. Without that proof, old keys and values speak."""
        (prompt,) = random_prompts([280], seed=31)
        manage(trainer, engine).publish(engine.version() + 1)
        engine.generate([prompt], GREEDY, num_samples=1)
        version = engine.version() + 1
        (faults / "keeps_prefixes").touch()
        try:
            trainer.disturb(0.1)
            with pytest.raises(EngineError, match="the prefix cache still gives keys and values of the weights befo"):
                manage(trainer, engine).publish(version)
            with pytest.raises(EngineError, match="answered 409: weights incomplete"):
                engine.check()

            (faults / "hides_prefixes").touch()  # the fault again, with the proof silenced: the sync looks right ...
            assert manage(trainer, engine).publish(version).canary_gap_max < 1e-4
            ((sample,),) = engine.generate([prompt], GREEDY, num_samples=1)
            expected = completion_logprobs(trainer.model, prompt, sample.token_ids)
            assert np.abs(sample.logprobs - expected).max() > 1e-2  # ... and the samples are wrong
        finally:
            (faults / "keeps_prefixes").unlink()
            (faults / "hides_prefixes").unlink(missing_ok=True)
        manage(trainer, engine).publish(version + 1)
        ((sample,),) = engine.generate([prompt], GREEDY, num_samples=1)
        expected = completion_logprobs(trainer.model, prompt, sample.token_ids)
        np.testing.assert_allclose(sample.logprobs, expected, atol=1e-4)
