"""Two ranks, by data or by sequence, give the loss and the weights of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from atropos_exp.processes.ports import HeldPort
from tests.helpers.paths import ROOT
from tests.helpers.trainer_cases import full_weights, make_batch, write_model
from tests.parts.trainer import ranks

# fp32 sums in another order
CLOSE = {"atol": 2e-6, "rtol": 1e-4}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes have run every case of `ranks.py`; and one rank has saved its own."""
    folder = tmp_path_factory.mktemp("ranks")
    write_model(folder / "tied")
    write_model(folder / "untied", tied=False)
    write_model(folder / "one_kv_head", num_key_value_heads=1)
    for name in ("adam", "lora"):
        trainer, _ = ranks.run(folder, name, num_updates=2)
        trainer.save(folder / f"{name}_saved_by_one")
    port = HeldPort()
    processes = []
    for rank in range(2):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port.number),
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, ranks.__file__, str(folder)]
        log = (folder / f"log_{rank}.txt").open("w")
        processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
        log.close()
    try:
        codes = [process.wait(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = "\n".join((folder / f"log_{rank}.txt").read_text()[-3000:] for rank in range(2))
    assert codes == [0, 0], logs
    return folder


def results(folder: Path, rank: int = 0) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / f"results_{rank}.json").read_text())
    return content


def assert_stats(actual: dict[str, Any], expected: Any) -> None:
    for name, value in actual.items():
        if name != "num_micro_batches":
            assert value == pytest.approx(getattr(expected, name), rel=2e-4, abs=2e-6, nan_ok=True), name


@pytest.mark.parametrize("name", list(ranks.CASES))
def test_two_ranks_are_one(two_ranks: Path, name: str) -> None:
    trainer, stats = ranks.run(two_ranks, name, num_updates=2, changes={"sequence_parallel_size": 1})
    both = results(two_ranks)[name]
    for actual, expected in zip(both["stats"], stats, strict=True):
        assert_stats(actual, expected)
        assert (actual["supervised_loss"] > 0) == ("mixed" in name)
    weights = load_file(two_ranks / f"{name}.safetensors")
    expected_weights = full_weights(trainer)
    assert weights.keys() == expected_weights.keys()
    for key, tensor in weights.items():
        torch.testing.assert_close(tensor, expected_weights[key], **CLOSE, msg=lambda text, k=key: f"{k}: {text}")
    for actual, expected in zip(both["logprobs"], ranks.scores_of(trainer), strict=True):
        np.testing.assert_allclose(actual, expected, atol=2e-4)


def test_two_ranks_give_the_matrices_of_one(two_ranks: Path) -> None:
    trainer, _ = ranks.run(two_ranks, "lora", num_updates=2)
    expected, gathered = dict(trainer.adapter(with_base=False)), load_file(two_ranks / "adapter.safetensors")
    assert gathered.keys() == expected.keys() and len(expected) == 2 * 2 * 3
    for name, tensor in gathered.items():
        torch.testing.assert_close(tensor, expected[name], **CLOSE)


def test_all_ranks_report_the_same(two_ranks: Path) -> None:
    zero, one = results(two_ranks, 0), results(two_ranks, 1)
    for name in ranks.CASES:
        assert json.dumps(zero[name]["stats"]) == json.dumps(one[name]["stats"])
        assert zero[name]["logprobs"] == one[name]["logprobs"]
        assert one[name]["empty"] and not zero[name]["empty"]  # rank 0 alone is given the weights
    assert zero["refused"] == one["refused"] and "trainer.json is missing" in one["refused"]


@pytest.mark.parametrize("name", ["adam", "lora"])
def test_a_checkpoint_of_one_rank_continues_on_two(two_ranks: Path, name: str) -> None:
    trainer, _ = ranks.run(two_ranks, name, num_updates=2)
    expected = trainer.update(make_batch(seed=5))
    assert_stats(results(two_ranks)[f"{name}_continued"]["stats"][0], expected)
    weights = load_file(two_ranks / f"{name}_continued.safetensors")
    for key, tensor in full_weights(trainer).items():
        torch.testing.assert_close(weights[key], tensor, **CLOSE)


@pytest.mark.parametrize("name", ["adam", "lora"])
def test_a_checkpoint_of_two_ranks_continues_on_one(two_ranks: Path, name: str) -> None:
    trainer, _ = ranks.run(two_ranks, name, num_updates=0)
    trainer.load(two_ranks / f"{name}_saved_by_two")
    saved = load_file(two_ranks / f"{name}.safetensors")
    for key, tensor in full_weights(trainer).items():
        assert torch.equal(saved[key], tensor), key
    uninterrupted, _ = ranks.run(two_ranks, name, num_updates=2)
    expected, actual = (one.update(make_batch(seed=5)) for one in (uninterrupted, trainer))
    assert actual.loss == pytest.approx(expected.loss, abs=1e-5)
    for key, tensor in full_weights(uninterrupted).items():
        torch.testing.assert_close(full_weights(trainer)[key], tensor, **CLOSE)
