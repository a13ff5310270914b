"""Weights overwritten in a real engine after a proven sync: the run names it within one step, in every dtype."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from atropos_exp.types import SyncStats
from atropos_exp.weights.publisher import WeightPublisher
from atropos_exp.weights.tensors import torch_dtype
from tests.helpers.experiments import command, environment, metrics, run_here, summary
from tests.helpers.paths import ROOT

LAYER = "model.layers.0."
AFTER = 4  # the sync
Sabotage = Callable[[str, torch.Tensor], torch.Tensor]


def another(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Other weights of the same size, in one layer."""
    if not name.startswith(LAYER):
        return tensor
    generator = torch.Generator().manual_seed(1)
    return tensor.flatten()[torch.randperm(tensor.numel(), generator=generator)].view(tensor.shape)


def overwrite(trainer: Any, engine: Any, version: int, change: Sabotage) -> None:
    """The engine serves this version with other weights, and nobody has told the trainer."""
    with engine.updating(version) as receiver:
        dtype = torch_dtype(engine.dtype)
        receiver.receive([(name, change(name, full.detach()).to(dtype)) for name, full in trainer.parameters()])


@pytest.fixture
def sabotaged(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the proven sync `AFTER`, every time."""
    publish = WeightPublisher.publish

    def publish_and_overwrite(self: WeightPublisher, version: int) -> SyncStats:
        stats = publish(self, version)
        if version == AFTER:
            overwrite(self._trainer, self._engine, version, another)
        return stats

    monkeypatch.setattr(WeightPublisher, "publish", publish_and_overwrite)


def failed(folder: Path, *overrides: str) -> str:
    """The error of a run in this process."""
    from hydra import compose, initialize_config_dir

    from atropos_exp.run import run

    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        config = compose("config", overrides=[*command(folder, *overrides)[3:]])
    assert run(config) == 1
    return str(summary(folder)["error"])


@pytest.mark.usefixtures("sabotaged")
def test_an_overwritten_layer_is_named_by_tensor(tmp_path: Path) -> None:
    """With digests once more before the next sync; in the dtype in which nothing else is as sharp."""
    folder = tmp_path / "run"
    overrides = ("trainer.max_steps=6", "engine.dtype=bfloat16", "checkpoint.every=1", "eval.num_prompts=0")
    error = failed(folder, *overrides, "sync.recheck=true")
    assert re.search(rf"WrongSampler: step {AFTER + 1}: .* version {AFTER} .*: {LAYER}\S+.* changed after", error)
    assert metrics(folder)[-1]["step"] == AFTER
    assert (folder / "rollouts" / f"step_{AFTER + 1:06d}.condemned.parquet").exists()
    assert summary(folder)["sync"]["count"] == summary(folder)["sync"]["verified"] == AFTER + 1


@pytest.mark.slow
def test_all_ranks_end_together(tmp_path: Path) -> None:
    """Of a gap that is not allowed every rank knows, and rank 0 puts the rollouts aside."""
    folder = tmp_path / "run"
    overrides = ("trainer.max_steps=3", "sync.max_gap=1e-12", "cluster.num_processes=2", "eval.num_prompts=0")
    done = subprocess.run(command(folder, *overrides), env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"WrongSampler: step 1: .* expected at most 1e-12 \(sync.max_gap\)", summary(folder)["error"])
    assert "Rank 1 failed: WrongSampler: step 1" in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in (folder / "rollouts").iterdir()] == ["step_000001.condemned.parquet"]


@pytest.mark.slow
@pytest.mark.usefixtures("sabotaged")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_overwritten_layer_is_named_by_what_it_sampled(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    overrides = (
        "trainer.max_steps=6",
        f"engine.dtype={dtype}",
        "checkpoint.every=1",
        "eval.num_prompts=0",
        "sync.recheck=false",
    )
    error = failed(folder, *overrides, "sync.recheck=false")
    assert re.search(rf"WrongSampler: step {AFTER + 1}: .* by \d.* nats .* expected at most .* in {dtype}\)", error)
    last = metrics(folder)[-1]
    assert last["step"] == AFTER + 1, "what stopped the run is in its metrics"
    assert last["policy/fresh_logprob_gap_mean"] > 5 * last["policy/fresh_logprob_gap_allowed"]
    assert max(path.name for path in (folder / "checkpoints").iterdir()).endswith(str(AFTER))
    rollouts = {path.name for path in (folder / "rollouts").iterdir()}
    assert {name for name in rollouts if "5" in name} == {f"step_{AFTER + 1:06d}.condemned.parquet"}
    if dtype == "float32":  # the engine is whole again, and the same command samples the step again
        monkeypatch.undo()
        found = run_here(folder, *overrides, "sync.recheck=false")
        assert (found["status"], found["steps"]) == ("finished", 6)
        gaps = [row["policy/fresh_logprob_gap_mean"] for row in metrics(folder)[1:]]
        assert len(gaps) == 6 and max(gaps) < 1e-4
