"""New weights reach vLLM whole, and it samples from them and from nothing older."""

from __future__ import annotations

import copy
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from atropos_exp.errors import WrongSampler
from atropos_exp.parts.engine.servers import Servers
from tests.helpers.publishing import HeldModel, manage
from tests.helpers.random_models import plain_logprobs, random_model, random_prompts
from tests.helpers.sampling_contract import sampling
from tests.helpers.sync_contract import SyncContract, check_no_older_key_is_read

pytestmark = pytest.mark.vllm


class TestSync(SyncContract):
    tolerance = 1e-4


def test_what_it_holds_is_the_same_once_more(engine: Servers) -> None:
    """Also where vLLM repacks its weights after the digests; and a tensor that it can read back is seen to change."""
    trainer, version = HeldModel(random_model(seed=6)), engine.version() + 1
    publisher = manage(trainer, engine, recheck=True)
    publisher.publish(version)
    trainer.disturb()
    publisher.publish(version + 1)
    publisher.publish(version + 2)
    with engine.updating(version + 2) as receiver:
        receiver.receive([(name, 1.5 * one if "norm" in name else one) for name, one in trainer.parameters()])
    with pytest.raises(WrongSampler, match=r"norm.weight and \d+ more|norm.weight.* changed after the proof"):
        publisher.publish(version + 3)
    publisher.publish(version + 3)


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


def test_an_update_waits_for_the_logprobs_of_truncated_samples(engine: Servers) -> None:
    """A sample of top-k is scored when nothing else runs: before an update that comes meanwhile, not after it."""
    trainer = HeldModel(random_model(seed=2))
    publisher = manage(trainer, engine)
    version = engine.version() + 1
    publisher.publish(version)
    before = copy.deepcopy(trainer.model)
    slow, quick = random_prompts([4, 5], seed=8)
    server = engine.replicas[0]
    finished = server.info()["num_rows"]
    with ThreadPoolExecutor(2) as pool:
        long = pool.submit(engine.generate, [slow], sampling(max_tokens=290, stop_token_ids=(), seed=1), num_samples=1)
        short = pool.submit(
            engine.generate, [quick], sampling(max_tokens=2, top_k=5, stop_token_ids=(), seed=2), num_samples=1
        )
        deadline = time.monotonic() + 60
        while server.info()["num_rows"] == finished:
            assert time.monotonic() < deadline, "the short sample has not been drawn"
        assert not long.done() and not short.done()
        trainer.disturb()
        publisher.publish(version + 1)
        ((sample,),) = short.result()
        assert long.result()[0][0].policy_version == version
    assert sample.policy_version == version
    expected = plain_logprobs(before, np.concatenate([quick, sample.token_ids]), 1.0)[-2:]
    np.testing.assert_allclose(sample.logprobs, expected, atol=1e-4)
