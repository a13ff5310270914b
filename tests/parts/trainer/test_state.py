"""Checkpoints: what continues from one is what never stopped, bit for bit."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from atropos_exp.errors import UserError
from atropos_exp.parts.trainer import tensor_files
from tests.helpers.trainer_cases import Lora, Model, full_weights, make_batch, plain_logprobs, plain_model, split

ADAM = {"learning_rate": 0.01, "adam_epsilon": 1e-8, "weight_decay": 0.1, "max_grad_norm": 1.0}
RUN = {**ADAM, "scheduler": "cosine", "warmup_steps": 2, "max_steps": 6, "num_mini_batches": 2}


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("rank", [0, 4])
def test_continuing_is_the_same_as_not_stopping(start: Any, tmp_path: Path, rank: int) -> None:
    model = Model(lora=Lora(rank=rank))
    batches = [make_batch(seed=seed) for seed in range(4)]
    straight = start(model=model, **RUN)
    expected = [straight.update(batch) for batch in batches]

    first = start(model=model, **RUN)
    for batch in batches[:2]:
        first.update(batch)
    first.save(tmp_path / "step")
    drawn = (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random())

    torch.manual_seed(99)  # the process that continues has another history
    second = start(model=model, **RUN)
    second.update(make_batch(seed=50))
    second.load(tmp_path / "step")
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()) == drawn
    assert [second.update(batch) for batch in batches[2:]] == expected[2:]
    assert equal(full_weights(second), full_weights(straight))

    straight.save(tmp_path / "straight")
    second.save(tmp_path / "second")
    for file in ("model.safetensors", "optimizer.safetensors", *(["adapter.safetensors"] if rank else [])):
        assert (tmp_path / "straight" / file).read_bytes() == (tmp_path / "second" / file).read_bytes(), file


def test_the_same_calls_give_the_same_bits(start: Any) -> None:
    batches = [make_batch(seed=seed, num_sequences=60) for seed in range(2)]
    one, two = start(**RUN), start(**RUN)
    assert [one.update(batch) for batch in batches] == [two.update(batch) for batch in batches]
    assert equal(full_weights(one), full_weights(two))


@pytest.mark.parametrize("tied", [True, False])
def test_the_model_file_is_what_transformers_reads(
    start: Any, model_folder: Path, untied_folder: Path, tmp_path: Path, tied: bool
) -> None:
    folder = model_folder if tied else untied_folder
    batch = make_batch()
    trainer = start(folder, **ADAM)
    trainer.update(batch)
    trainer.save(tmp_path / "step")
    (tmp_path / "step" / "config.json").write_bytes((folder / "config.json").read_bytes())
    model = plain_model(tmp_path / "step")
    ids = split(batch)[1]["token_ids"]
    with torch.no_grad():
        expected = plain_logprobs(model, ids, 1.0).numpy()
    np.testing.assert_allclose(trainer.logprobs([ids.numpy()], temperature=1.0)[0], expected, atol=1e-5)
    names = {name for name, _ in trainer.parameters()}
    assert ("lm_head.weight" in names) is not tied  # a tied head is given once
    assert names == {name for name, _ in model.named_parameters()}


def test_files_are_bounded(start: Any, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_files, "MAX_FILE_BYTES", 60_000)
    trainer = start(**ADAM)
    trainer.update(make_batch())
    trainer.save(tmp_path / "step")
    files = sorted((tmp_path / "step").glob("model-*.safetensors"))
    assert len(files) > 3 and all(file.stat().st_size < 66_000 for file in files)
    expected = full_weights(trainer)
    again = start(**ADAM)
    again.load(tmp_path / "step")
    assert equal(full_weights(again), expected)
    (tmp_path / "step" / "config.json").write_bytes((model_folder / "config.json").read_bytes())
    model = plain_model(tmp_path / "step")  # transformers understands the index
    assert equal({name: p.detach() for name, p in model.named_parameters()}, expected)


def test_nothing_is_pickled(start: Any, tmp_path: Path) -> None:
    trainer = start(**ADAM)
    trainer.update(make_batch())
    trainer.save(tmp_path / "step")
    assert sorted(file.name for file in (tmp_path / "step").iterdir()) == [
        "model.safetensors",
        "optimizer.safetensors",
        "random.safetensors",
        "trainer.json",
    ]
    counters = json.loads((tmp_path / "step" / "trainer.json").read_text())["counters"]
    assert counters == {"updates": 1, "optimizer_steps": 1, "bad_steps": 0}


def test_a_checkpoint_that_does_not_fit_is_refused(start: Any, untied_folder: Path, tmp_path: Path) -> None:
    trainer = start()
    trainer.update(make_batch())
    trainer.save(tmp_path / "step")
    with pytest.raises(UserError, match=r"trainer\.json is missing"):
        trainer.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"1 tensors differ.*model: lm_head\.weight: shape absent in the checkpoint"):
        start(untied_folder).load(tmp_path / "step")
    with pytest.raises(UserError, match=r"model\.lora"):
        start(model=Model(lora=Lora(rank=2))).load(tmp_path / "step")
    file = tmp_path / "step" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    before = full_weights(trainer)
    with pytest.raises(UserError, match="damaged"):
        trainer.load(tmp_path / "step")
    assert equal(full_weights(trainer), before)
