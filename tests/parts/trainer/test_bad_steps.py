"""Non-finite losses and gradients: applied never, dumped always, fatal after a few in a row."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from atropos_exp.types import TrainBatch
from tests.helpers.trainer_cases import full_weights, make_batch


def poisoned(value: float = math.nan) -> TrainBatch:
    batch = make_batch()
    advantages_S = batch.advantages_S.clone()
    advantages_S[batch.trained_S.nonzero()[2]] = value
    return dataclasses.replace(batch, advantages_S=advantages_S)


class SteepLoss:
    """A finite loss with an infinite gradient."""

    kl_coef = 0.0

    def __call__(self, *, logprobs_NR: Tensor, mask_NR: Tensor, **_: Any) -> tuple[Tensor, dict[str, float]]:
        loss = (logprobs_NR - logprobs_NR.detach()).masked_select(mask_NR).abs().sqrt().sum()
        return loss, {"policy_loss": 0.0, "clip_fraction": 0.0, "reference_kl": 0.0}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_batch_changes_nothing_and_is_kept(start: Any, tmp_path: Path, value: float) -> None:
    trainer, untouched = start(learning_rate=0.1), start(learning_rate=0.1)
    good, bad = make_batch(seed=1), poisoned(value)
    before = full_weights(trainer)
    stats = trainer.update(bad)
    assert stats.skipped and not math.isfinite(stats.loss)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.parameters())
    dump = load_file(tmp_path / "dumps" / "bad_batch_000001.safetensors")
    torch.testing.assert_close(dump["advantages_S"], bad.advantages_S, equal_nan=True)
    assert torch.equal(dump["token_ids_S"], bad.token_ids_S)
    # afterwards training goes on as if the batch had never been
    assert trainer.update(good) == untouched.update(good)
    assert all(torch.equal(tensor, full_weights(untouched)[name]) for name, tensor in trainer.parameters())


def test_a_bad_gradient_is_caught_when_the_loss_is_fine(start: Any) -> None:
    trainer = start(loss=SteepLoss())
    before = full_weights(trainer)
    stats = trainer.update(make_batch())
    assert stats.skipped and math.isfinite(stats.loss) and not math.isfinite(stats.grad_norm)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.parameters())


def test_some_in_a_row_stop_the_run(start: Any, tmp_path: Path) -> None:
    trainer = start(max_bad_steps=2)
    trainer.update(poisoned())
    trainer.update(make_batch())  # a good one in between: the count starts again
    trainer.update(poisoned())
    with pytest.raises(RuntimeError, match=r"2 updates in a row .*bad_batch_000003\S+, \S+bad_batch_000004"):
        trainer.update(poisoned())
    assert len(list((tmp_path / "dumps").iterdir())) == 3


def test_a_bad_mini_batch_ends_its_update(start: Any) -> None:
    """The poisoned sequence is in the first of two mini-batches: the second is not applied either."""
    trainer = start(num_mini_batches=2)
    before = full_weights(trainer)
    assert trainer.update(poisoned()).skipped
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.parameters())


def test_gradients_are_clipped(start: Any) -> None:
    batch = make_batch()
    free, clipped = start(), start(max_grad_norm=0.01)
    before = full_weights(free)
    norm = free.update(batch).grad_norm
    assert clipped.update(batch).grad_norm == norm > 0.1  # reported before clipping
    moved = full_weights(clipped)
    for name, tensor in free.parameters():
        # the optimizer moves a weight by g / (|g| + 1)
        step = before[name] - tensor
        gradient = step / (1 - step.abs())
        small = gradient * (0.01 / norm)
        torch.testing.assert_close(before[name] - moved[name], small / (small.abs() + 1), atol=1e-6, rtol=1e-3)
