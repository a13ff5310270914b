"""What the canary sees in an engine whose digests were right, or that lies about them; and what it leaves alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from atropos_exp.errors import SyncError
from atropos_exp.parts.engine.servers import Servers
from atropos_exp.weights.expectation import CEILING, Expectation
from tests.helpers.publishing import HeldModel, manage
from tests.helpers.random_models import random_model, random_prompts
from tests.helpers.sabotage import Change, LiesAboutDigests, one_layer_larger, swap_q_and_k

CANARY = random_prompts([12, 9, 16, 11], seed=5)


@pytest.fixture(params=["float32", "bfloat16"], scope="module")
def served(request: pytest.FixtureRequest, start: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    engine = start(tmp_path_factory.mktemp(request.param), random_model(), dtype=request.param)
    yield engine
    engine.stop()


def publish(trainer: HeldModel, line: Any, first: int, *, num: int, by: float = 0.02) -> Any:
    """So many honest syncs, as of small updates; their publisher."""
    publisher = manage(trainer, line, canary=CANARY, tolerance=None, bucket_bytes=1 << 30)
    for version in range(first, first + num):
        trainer.wander(by)
        publisher.publish(version)
    return publisher


@pytest.mark.parametrize("change", [swap_q_and_k, one_layer_larger])
def test_a_change_after_the_digests_is_named_at_once(change: Change, served: Servers) -> None:
    torch.manual_seed(3)
    trainer, line, first = HeldModel(random_model(seed=7)), LiesAboutDigests(served), served.version() + 1
    publisher = publish(trainer, line, first, num=6)
    line.change = change
    with pytest.raises(SyncError, match=r"differ by 0\.\d+|differ by \d.* does not serve the trainer's weights"):
        publisher.publish(first + 6)
    line.change = None
    publisher.publish(first + 6)


def test_an_ignored_update_is_named_at_once(served: Servers) -> None:
    torch.manual_seed(4)
    trainer, line, first = HeldModel(random_model(seed=8)), LiesAboutDigests(served), served.version() + 1
    publisher = publish(trainer, line, first, num=6)
    line.ignores = True
    trainer.wander(0.1)
    with pytest.raises(SyncError, match=r"does not serve the trainer's weights|have not moved with"):
        publisher.publish(first + 6)


def test_small_updates_that_are_ignored_add_up(served: Servers) -> None:
    """Each is smaller than what rounding may do to the gap in bfloat16; it never reaches what is allowed there."""
    torch.manual_seed(5)
    trainer, line, first = HeldModel(random_model(seed=9)), LiesAboutDigests(served), served.version() + 1
    publisher = publish(trainer, line, first, num=6, by=0.003)
    line.ignores = True
    ended = []
    for version in range(first + 6, first + 80):
        trainer.wander(0.003)
        try:
            gap = publisher.publish(version).canary_gap_mean
        except SyncError as error:
            ended.append(str(error))
            break
        assert gap < CEILING[served.dtype]
    assert ended, "never named"
    if served.dtype == "bfloat16":
        assert "have not moved with the trainer's" in ended[0] and "ignores updates" in ended[0]


def test_honest_syncs_pass(served: Servers) -> None:
    """Updates of every size, and some that change nothing."""
    torch.manual_seed(6)
    sizes = np.random.default_rng(0)
    trainer, first = HeldModel(random_model(seed=10)), served.version() + 1
    publisher = manage(trainer, served, canary=CANARY, tolerance=None, bucket_bytes=1 << 30)
    followed = []
    for version in range(first, first + 40):
        trainer.wander(float(10 ** sizes.uniform(-4, -0.5)) if version % 7 else 0.0)
        stats = publisher.publish(version)
        assert stats.canary_gap_mean < stats.canary_gap_allowed / 1.5
        followed.append(publisher._expectations[0].follows)
    assert stats.canary_gap_allowed < CEILING[served.dtype] or served.dtype == "float32"
    assert None in followed and min(share for share in followed if share is not None) > 0.8


def scores(*values: float) -> list[np.ndarray]:
    return [np.array(values, dtype=np.float32)]


def test_what_is_allowed_by_hand() -> None:
    expectation = Expectation("bfloat16", tolerance=None)
    zero = scores(0, 0, 0, 0)
    for version, gap in enumerate((0.02, 0.04, 0.01, 0.01, 0.01)):
        assert expectation.allowed.mean == 0.5 and "default for bfloat16" in expectation.allowed.reason
        expectation.learn(zero, scores(gap, -gap, gap, 0.5 - gap), version=version)
    largest = (0.04 * 3 + 0.46) / 4
    assert expectation.allowed.mean == pytest.approx(min(0.5, 4 * largest))
    exact = Expectation("bfloat16", tolerance=None)
    for version in range(5):
        exact.learn(zero, zero, version=version)
    assert (exact.allowed.mean, exact.allowed.token) == (0.08, 0.8)
    given = Expectation("bfloat16", tolerance=0.25)
    for version in range(5):
        given.learn(zero, zero, version=version)
    assert (given.allowed.mean, given.allowed.token, given.allowed.reason) == (0.25, 2.5, "sync.tolerance")
    given.follow(scores(9, 9, 9, 9), zero, version=4)  # the user decides


def test_movement_by_hand() -> None:
    expectation = Expectation("bfloat16", tolerance=None)
    zero = scores(*[0.0] * 8)
    for version in range(5):
        expectation.learn(zero, zero, version=version)
    small, large = scores(*[0.1, -0.1] * 4), scores(*[0.2, -0.2] * 4)
    # noise sqrt(2) x 0.08 / 4 = 0.028; of eight tokens seven count: 0.5 x sqrt(7) x 0.2 = 0.26 >= 8 x 0.028 = 0.226
    expectation.follow(small, zero, version=3)  # 0.13: cannot be judged yet
    with pytest.raises(SyncError, match=r"moved by 0.2 nats .* since version 0, and the engine's by 0% of that"):
        expectation.follow(large, zero, version=4)
    with pytest.raises(SyncError, match="by 45% of that"):
        expectation.follow(large, scores(*[0.09, -0.09] * 4), version=4)
    one_is_off = scores(*[0.2, -0.2] * 3, 0.2, 5.0)
    expectation.follow(large, one_is_off, version=4)
    assert expectation.follows == pytest.approx(1.0)
    with pytest.raises(SyncError, match="since version 4"):
        expectation.follow(zero, one_is_off, version=5)
