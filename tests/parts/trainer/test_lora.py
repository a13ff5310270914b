"""Low-rank adapters: only they are trained, and the export is base + scale * B @ A."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from atropos_exp.errors import UserError
from tests.helpers.trainer_cases import Lora, Model, full_weights, make_batch, plain_logprobs, plain_model, split

ADAM = {"learning_rate": 0.02, "adam_epsilon": 1e-8}
LORA = Model(lora=Lora(rank=4, alpha=8, target_modules=["q_proj", "v_proj", "down_proj"]))


def test_export_is_the_hand_merge(start: Any, model_folder: Path, tmp_path: Path) -> None:
    trainer = start(model=LORA, **ADAM)
    base = {name: p.detach() for name, p in plain_model(model_folder).named_parameters()}
    for name, tensor in full_weights(trainer).items():
        torch.testing.assert_close(tensor, base[name], atol=0, rtol=0)  # B starts at zero
    first = trainer.update(make_batch(behaviour="none"))
    for _ in range(5):
        last = trainer.update(make_batch(behaviour="none"))
    assert last.loss < first.loss
    trainer.save(tmp_path)
    adapter = load_file(tmp_path / "adapter.safetensors")
    stored_base = load_file(tmp_path / "model.safetensors")
    merged = full_weights(trainer)
    assert merged.keys() == base.keys() == stored_base.keys()
    changed = 0
    for name, tensor in merged.items():
        assert torch.equal(stored_base[name], base[name])
        prefix = "base_model.model." + name.removesuffix(".weight")
        expected = base[name]
        if f"{prefix}.lora_A.default.weight" in adapter:
            low, high = adapter[f"{prefix}.lora_A.default.weight"], adapter[f"{prefix}.lora_B.default.weight"]
            expected = expected + 8 / 4 * high @ low
            changed += 1
            assert (tensor - base[name]).abs().max() > 1e-3
        torch.testing.assert_close(tensor, expected, atol=1e-6, rtol=1e-6)
    assert changed == 3 * 2
    again = full_weights(trainer)  # exporting does not touch what is trained
    assert all(torch.equal(again[name], merged[name]) for name in merged)


def test_matrices_are_given_by_themselves_scaled_and_beside_the_frozen_base(start: Any, model_folder: Path) -> None:
    trainer = start(model=LORA, **ADAM)
    for _ in range(2):
        trainer.update(make_batch(behaviour="none"))
    alone = dict(trainer.adapter(with_base=False))
    assert len(alone) == 2 * 2 * 3 and all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in alone)
    assert alone["model.layers.1.mlp.down_proj.lora_A.weight"].shape == (4, 96)
    assert alone["model.layers.1.mlp.down_proj.lora_B.weight"].shape == (64, 4)
    whole = dict(trainer.adapter(with_base=True))
    base = {name: p.detach() for name, p in plain_model(model_folder).named_parameters()}
    assert whole.keys() == base.keys() | alone.keys()
    for name, merged in full_weights(trainer).items():
        torch.testing.assert_close(whole[name], base[name], atol=0, rtol=0)
        module = name.removesuffix(".weight")
        if f"{module}.lora_A.weight" in alone:  # B is scaled already
            low, high = alone[f"{module}.lora_A.weight"], alone[f"{module}.lora_B.weight"]
            assert (high @ low).abs().max() > 1e-3
            torch.testing.assert_close(base[name] + high @ low, merged, atol=1e-6, rtol=1e-6)
        else:
            torch.testing.assert_close(base[name], merged, atol=0, rtol=0)


def test_merged_weights_give_the_logprobs_of_the_adapted_model(start: Any, model_folder: Path) -> None:
    trainer = start(model=LORA, **ADAM)
    batch = make_batch()
    for _ in range(3):
        trainer.update(batch)
    model = plain_model(model_folder)
    model.load_state_dict(full_weights(trainer), strict=False)
    ids = split(batch)[1]["token_ids"]
    with torch.no_grad():
        expected = plain_logprobs(model, ids, 1.0).numpy()
    np.testing.assert_allclose(trainer.logprobs([ids.numpy()], temperature=1.0)[0], expected, atol=2e-5)


def test_gradient_checkpointing_and_bfloat16(start: Any) -> None:
    model = Model(lora=LORA.lora, gradient_checkpointing=True, dtype="bfloat16")
    trainer = start(model=model, **ADAM)
    losses = [trainer.update(make_batch(behaviour="none")).loss for _ in range(4)]
    assert losses[-1] < losses[0] - 0.01


def test_adapters_on_the_output_head_are_refused(start: Any) -> None:
    with pytest.raises(UserError, match="output head is not supported"):
        start(model=Model(lora=Lora(rank=2, target_modules=["lm_head"])))
