"""The arithmetic of an update, counted by PyTorch itself."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from atropos_exp.parts.trainer.flops import PEAK_FLOPS, UpdateFlops, peak_flops
from tests.helpers.trainer_cases import VOCAB, Lora, Model, make_batch, plain_model

LENGTH = 11


def counted(model: Any) -> int:
    """Forward and backward of one sequence with logits everywhere, by PyTorch's counter."""
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=torch.arange(LENGTH)[None]).logits
        logits.sum().backward()
    return counter.get_total_flops()


def test_the_count_is_that_of_the_operations(model_folder: Path) -> None:
    model = plain_model(model_folder)
    flops = UpdateFlops(model, model.config, lora=False)
    # PyTorch counts all T x T scores, we the causal half with its diagonal: 2 layers, 4 heads of 16, q k and p v
    rotation = 2 * 8 * LENGTH  # angles of the rotary embedding, a matrix product in transformers
    unseen = 3 * 2 * (4 * 16) * 4 * (LENGTH**2 - LENGTH * (LENGTH + 1) / 2)
    assert flops([LENGTH], LENGTH) == pytest.approx(counted(model) - rotation - unseen, rel=1e-6)


def test_only_trained_tokens_pass_the_head_and_only_sequences_attend(model_folder: Path) -> None:
    model = plain_model(model_folder)
    full, lora = (UpdateFlops(model, model.config, lora=lora) for lora in (False, True))
    assert full([LENGTH], 7) - full([LENGTH], 3) == 3 * 2 * VOCAB * 64 * 4
    assert full([2 * LENGTH], 5) > 2 * full([LENGTH], 2.5)  # type: ignore[arg-type]
    assert lora([LENGTH], 5) == pytest.approx(full([LENGTH], 5) * 2 / 3)


def test_a_cpu_has_no_peak(start: Any) -> None:
    assert math.isnan(peak_flops(torch.device("cpu")))
    for model in (Model(), Model(lora=Lora(rank=4))):
        trainer = start(model=model)
        assert math.isnan(trainer.update(make_batch()).peak_seconds)
    assert trainer._flops([LENGTH], 5) > 0
    assert min(PEAK_FLOPS.values()) > 1e13
