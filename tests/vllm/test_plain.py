"""Where vLLM computes with plain parameters, weights are loaded straight into them, and every digest is of these."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atropos_exp.errors import EngineError, SyncError
from atropos_exp.parts.engine.servers import Servers
from atropos_exp.parts.engine.vllm import settings as vllm
from atropos_exp.types import SamplingParams
from atropos_exp.weights.digest import digest
from tests.helpers.faulty_lines import SQUARE, BreaksHalfWay, DeliversOld, LosesOne, TransposesOne
from tests.helpers.publishing import HeldModel, manage
from tests.helpers.random_models import completion_logprobs, random_model, random_prompts
from tests.helpers.sync_contract import check_tied_head_under_its_own_name

pytestmark = pytest.mark.vllm

GREEDY = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, max_tokens=8, stop_token_ids=(), seed=0)


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def plain(faults: Path, tmp_path_factory: pytest.TempPathFactory, start: Any) -> Iterator[Servers]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm, "SERVER", "tests.vllm.plain_server")
        patch.setenv("VLLM_FAULTS", str(faults))
        client = start(tmp_path_factory.mktemp("plain"), random_model(seed=0))
    yield client
    client.stop()


@pytest.fixture
def trainer() -> Any:
    return HeldModel(random_model(seed=7))


def test_every_digest_is_of_a_resident_tensor(plain: Servers, trainer: Any) -> None:
    parameters = dict(trainer.model.named_parameters())
    for bucket_bytes in (1, 40_000, 1 << 30):
        trainer.disturb()
        version = plain.version() + 1
        stats = manage(trainer, plain, bucket_bytes=bucket_bytes).publish(version)
        assert stats.canary_gap_max < 1e-4 and stats.digests_compared == len(parameters)
        assert plain.replicas[0].digests() == {name: digest(tensor) for name, tensor in parameters.items()}
        info = plain.replicas[0].info()
        assert info["loads_plainly"] is True and info["num_resident_digests"] == len(parameters)
        assert set(info["update_seconds"]) == {"begin", "load", "digests", "finish", "prefixes"}
        assert stats.seconds == pytest.approx(
            sum(stats.seconds_by_part[part] for part in ("open", "gather", "send", "commit"))
        )
        assert stats.seconds_by_part["send"] > info["update_seconds"]["load"] > 0
    (prompt,) = random_prompts([40], seed=3)
    ((sample,),) = plain.generate([prompt], GREEDY, num_samples=1)
    expected = completion_logprobs(trainer.model, prompt, sample.token_ids, 1.0)
    np.testing.assert_allclose(sample.logprobs, expected, atol=1e-4)


def test_a_tied_head_under_its_own_name_is_compared_with_the_embedding(plain: Servers) -> None:
    check_tied_head_under_its_own_name(plain)


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        (LosesOne, SyncError, f"the engine gave no digest of {SQUARE}"),
        (TransposesOne, SyncError, rf"other bits than were sent of {SQUARE} \(1 tensors differ\)"),
        (BreaksHalfWay, ConnectionError, "the line is cut"),
    ],
)
def test_faults_on_the_line(plain: Servers, trainer: Any, line: Any, error: type[Exception], message: str) -> None:
    version = plain.version() + 1
    with pytest.raises(error, match=message):
        manage(trainer, line(plain), bucket_bytes=1).publish(version)
    with pytest.raises(EngineError, match=f"answered 409: weights incomplete: update to version {version} interr"):
        plain.check()
    assert manage(trainer, plain).publish(version).canary_gap_max < 1e-4


def test_stale_weights_under_a_new_version(plain: Servers, trainer: Any) -> None:
    version = plain.version() + 1
    stale = DeliversOld(plain, trainer.model)
    manage(trainer, plain).publish(version)
    trainer.disturb()
    with pytest.raises(SyncError, match=r"the engine holds other bits than were sent of .* and \d+ more"):
        manage(trainer, stale).publish(version + 1)
    manage(trainer, plain).publish(version + 1)


def test_a_tensor_that_arrives_and_is_not_loaded(plain: Servers, faults: Path, trainer: Any) -> None:
    """A digest of what arrived would be right."""
    version = plain.version() + 1
    manage(trainer, plain).publish(version)
    trainer.disturb(0.001)
    (faults / "loses_one_inside").touch()
    try:
        with pytest.raises(SyncError, match=rf"other bits than were sent of {SQUARE} \(1 tensors differ\)"):
            manage(trainer, plain).publish(version + 1)
    finally:
        (faults / "loses_one_inside").unlink()
    manage(trainer, plain).publish(version + 1)
