"""One method after another: scoring between updates, exports and loads must leave no trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.trainer_cases import Model, full_weights, make_batch, plain_model, split

SCORED = [part["token_ids"].numpy() for part in split(make_batch(seed=9))]
ADAM = {"learning_rate": 0.01, "adam_epsilon": 1e-8, "max_grad_norm": 1.0}


@pytest.mark.parametrize("reshard", [True, False])
def test_export_after_scoring_gives_the_masters(start: Any, model_folder: Path, reshard: bool) -> None:
    """Scoring gathers weights in bfloat16; the export must still be the float32 ones."""
    trainer = start(model=Model(dtype="bfloat16"), reshard_after_forward=reshard, **ADAM)
    trainer.logprobs(SCORED, temperature=1.0)
    expected = {name: p.detach() for name, p in plain_model(model_folder).named_parameters()}
    for name, tensor in trainer.parameters():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("reshard", [True, False])
def test_loading_after_scoring_takes_effect(start: Any, tmp_path: Path, reshard: bool) -> None:
    trainer = start(reshard_after_forward=reshard, **ADAM)
    first = trainer.logprobs(SCORED, temperature=1.0)
    trainer.save(tmp_path)
    for _ in range(3):
        trainer.update(make_batch())
    assert np.abs(np.concatenate(trainer.logprobs(SCORED, temperature=1.0)) - np.concatenate(first)).max() > 0.1
    trainer.load(tmp_path)
    for ours, theirs in zip(trainer.logprobs(SCORED, temperature=1.0), first, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_scoring_and_exporting_do_not_change_training(start: Any, tmp_path: Path) -> None:
    quiet, busy = start(**ADAM), start(**ADAM)
    for seed in range(2):
        expected = quiet.update(make_batch(seed=seed))
        busy.logprobs(SCORED, temperature=0.5)
        assert busy.update(make_batch(seed=seed)) == expected
        busy.save(tmp_path / str(seed))
        full_weights(busy)
    weights = full_weights(quiet)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in busy.parameters())


@pytest.mark.parametrize("changes", [{"offload_parameters": True, "offload_optimizer": True}])
def test_offloading_changes_nothing(start: Any, changes: dict[str, bool]) -> None:
    near, far = start(**ADAM), start(**ADAM, **changes)
    for seed in range(2):
        assert near.update(make_batch(seed=seed)) == far.update(make_batch(seed=seed))
    weights = full_weights(near)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in far.parameters())
