"""Faults between trainer and vLLM, and inside it: each is caught and named, and the engine refuses to sample."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faulty_lines import (
    SQUARE,
    BreaksHalfWay,
    DeliversOld,
    DeliversOldAndCannotTell,
    FaultyLine,
    LosesOne,
    TransposesOne,
)

from atropos_exp.engine import vllm
from atropos_exp.engine.client import EngineClient
from atropos_exp.sharding.proof import SyncError
from atropos_exp.types import SamplingParams
from atropos_exp.wire import EngineError

pytestmark = pytest.mark.vllm

GREEDY = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, max_tokens=4, stop_token_ids=(), seed=0)


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def faulty(faults: Path, tmp_path_factory: pytest.TempPathFactory, helpers: Any) -> Iterator[EngineClient]:
    """A server with faults of its own that can be turned on; without them it is the real one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm, "SERVER", "faulty_server")
        paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
        patch.setenv("VLLM_FAULTS", str(faults))
        client = helpers.start(tmp_path_factory.mktemp("faulty"), helpers.random_model(tied=True, seed=0))
    yield client
    client.stop()


@pytest.fixture
def trainer(helpers: Any) -> Any:
    return helpers.HeldModel(helpers.random_model(tied=True, seed=7))


def assert_refuses_then_recovers(engine: EngineClient, trainer: Any, helpers: Any, version: int) -> None:
    for refused in (engine.check, lambda: engine.score(helpers.canary, temperature=1.0)):
        with pytest.raises(EngineError, match=f"answered 409: weights incomplete: update to version {version} interr"):
            refused()
    helpers.manage(trainer, engine).publish(version)
    engine.check()


def test_a_skipped_tensor(faulty: EngineClient, trainer: Any, helpers: Any) -> None:
    """Lost on the line, and never given by the trainer."""
    version = faulty.version() + 1
    with pytest.raises(SyncError, match=f"the engine gave no digest of {SQUARE}"):
        helpers.manage(trainer, LosesOne(faulty), bucket_bytes=1).publish(version)
    assert_refuses_then_recovers(faulty, trainer, helpers, version)

    class Forgets(helpers.HeldModel):  # type: ignore[misc, name-defined]
        def parameters(self) -> Any:
            return (pair for pair in super().parameters() if pair[0] != SQUARE)

    with pytest.raises(SyncError, match=rf"{SQUARE} of \d+ tensors never sent to the engine"):
        helpers.manage(Forgets(trainer.model), faulty).publish(version + 1)
    assert_refuses_then_recovers(faulty, trainer, helpers, version + 1)


def test_the_server_itself_misses_a_skipped_tensor(faulty: EngineClient, trainer: Any, helpers: Any) -> None:
    version = faulty.version() + 1
    with (
        pytest.raises(EngineError, match=rf"update to version {version} misses {SQUARE} of \d+ tensors"),
        faulty.updating(version) as receiver,
    ):
        receiver.receive([(name, tensor) for name, tensor in trainer.parameters() if name != SQUARE])
    assert_refuses_then_recovers(faulty, trainer, helpers, version)


def test_a_transposed_tensor(faulty: EngineClient, trainer: Any, helpers: Any) -> None:
    """On the line the digest names it. In the trainer's hands, before any digest, the canary sees it."""
    version = faulty.version() + 1
    with pytest.raises(SyncError, match=rf"other bits than were sent of {SQUARE} \(1 tensors differ\)"):
        helpers.manage(trainer, TransposesOne(faulty)).publish(version)
    assert_refuses_then_recovers(faulty, trainer, helpers, version)

    class Transposes(helpers.HeldModel):  # type: ignore[misc, name-defined]
        def parameters(self) -> Any:
            return ((name, tensor.T if name == SQUARE else tensor) for name, tensor in super().parameters())

    with pytest.raises(SyncError, match=r"canary prompt 0, token \d: the engine gives -.* and the trainer -"):
        helpers.manage(Transposes(trainer.model), faulty).publish(version + 1)
    assert_refuses_then_recovers(faulty, trainer, helpers, version + 1)


def test_stale_weights_under_a_new_version(faulty: EngineClient, trainer: Any, helpers: Any) -> None:
    """With the digests, and with the canary alone."""
    for line, message in (
        (DeliversOld, r"the engine holds other bits than were sent of .* and \d+ more"),
        (DeliversOldAndCannotTell, r"canary prompt .* after the sync to version \d+; .*does not serve"),
    ):
        helpers.manage(trainer, faulty).publish(faulty.version() + 1)
        stale = line(faulty, trainer.model)
        trainer.disturb()
        version = faulty.version() + 1
        with pytest.raises(SyncError, match=message):
            helpers.manage(trainer, stale).publish(version)
        assert_refuses_then_recovers(faulty, trainer, helpers, version)


def test_a_version_that_did_not_change(faulty: EngineClient, trainer: Any, helpers: Any) -> None:
    line = FaultyLine(faulty)
    version = faulty.version() + 1
    line.version = lambda: version - 1
    with pytest.raises(SyncError, match=f"serves version {version - 1} after the sync to version {version}"):
        helpers.manage(trainer, line).publish(version)
    assert_refuses_then_recovers(faulty, trainer, helpers, version)


def test_an_interruption_half_way(faulty: EngineClient, trainer: Any, helpers: Any) -> None:
    version = faulty.version() + 1
    with pytest.raises(ConnectionError, match="the line is cut"):
        helpers.manage(trainer, BreaksHalfWay(faulty), bucket_bytes=1).publish(version)
    with pytest.raises(EngineError, match=rf"version {version} interrupted after 3 of \d+ tensors"):
        faulty.check()
    assert_refuses_then_recovers(faulty, trainer, helpers, version)


def test_a_tied_head_that_stays_stale(faulty: EngineClient, faults: Path, trainer: Any, helpers: Any) -> None:
    """vLLM's CPU head computes with a packed copy of the embedding. Unless it is loaded too, every digest is right, the
    version counts up, and the logprobs are those of another model: the canary alone sees it."""
    helpers.manage(trainer, faulty).publish(faulty.version() + 1)
    version = faulty.version() + 1
    (faults / "forgets_head").touch()
    try:
        trainer.disturb()
        with pytest.raises(SyncError, match=rf"canary prompt \d.* after the sync to version {version}; .*not serve"):
            helpers.manage(trainer, faulty).publish(version)
    finally:
        (faults / "forgets_head").unlink()
    assert_refuses_then_recovers(faulty, trainer, helpers, version)


def test_a_prefix_cache_that_is_not_emptied(faulty: EngineClient, faults: Path, trainer: Any, helpers: Any) -> None:
    """The server finds its own prompt in the cache and refuses. Without that proof, old keys and values would speak."""
    (prompt,) = helpers.prompts([280], seed=31)
    helpers.manage(trainer, faulty).publish(faulty.version() + 1)
    faulty.generate([prompt], GREEDY, num_samples=1)
    version = faulty.version() + 1
    (faults / "keeps_prefixes").touch()
    try:
        trainer.disturb(0.1)
        with pytest.raises(EngineError, match=r"the prefix cache still gives keys and values of the weights before"):
            helpers.manage(trainer, faulty).publish(version)
        with pytest.raises(EngineError, match="answered 409: weights incomplete"):
            faulty.check()

        (faults / "hides_prefixes").touch()  # the fault again, with the proof silenced: the sync looks right ...
        assert helpers.manage(trainer, faulty).publish(version).canary_gap_max < 1e-4
        ((sample,),) = faulty.generate([prompt], GREEDY, num_samples=1)
        expected = helpers.logprobs(trainer.model, prompt, sample.token_ids, 1.0)
        assert np.abs(sample.logprobs - expected).max() > 1e-2  # ... and the samples are wrong
    finally:
        (faults / "keeps_prefixes").unlink()
        (faults / "hides_prefixes").unlink(missing_ok=True)
    helpers.manage(trainer, faulty).publish(version + 1)
    ((sample,),) = faulty.generate([prompt], GREEDY, num_samples=1)
    expected = helpers.logprobs(trainer.model, prompt, sample.token_ids, 1.0)
    np.testing.assert_allclose(sample.logprobs, expected, atol=1e-4)
