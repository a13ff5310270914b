"""The trainer on one GPU computes what it computes on the CPU in float32, and on two GPUs what it does on one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.gpu.gpu_cases import CASES, SAVED

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

# float32: sums in another order. bfloat16 keeps 8 bits of each activation and gathered weight, against float32.
LOSS = {"fp32": 1e-5, "bf16": 5e-3}  # absolute; the losses are of order 1
GRAD_NORM = {"fp32": 1e-4, "bf16": 3e-2}  # relative
CHANGE = {"fp32": 2e-4, "bf16": 0.06}  # |change - expected change| / |expected change|, over all weights
LOGPROBS = {"fp32": 2e-4, "bf16": 0.05}  # nats, mean over tokens
SAME = ("loss", "policy_loss", "supervised_loss", "entropy", "logprob_gap_mean", "reference_kl")


def kind(name: str) -> str:
    return name.split("_")[0]


def change(folder: Any, way: str, name: str) -> torch.Tensor:
    """What the updates added to the weights, as one vector; float32."""
    before = load_file(folder / CASES[name][0] / "model.safetensors")
    after = load_file(folder / f"{way}_{name}.safetensors")
    assert after.keys() == before.keys()
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    return torch.cat([(after[key] - before[key]).flatten() for key in sorted(before)])


def assert_same_run(name: str, actual: dict[str, Any], expected: dict[str, Any]) -> None:
    precision = kind(name)
    for ours, theirs in zip(actual["stats"], expected["stats"], strict=True):
        assert not ours["skipped"] and math.isfinite(ours["loss"])
        for key in SAME:
            assert ours[key] == pytest.approx(theirs[key], abs=LOSS[precision] * max(1, abs(theirs[key]))), key
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=GRAD_NORM[precision])
        assert ours["num_trained_tokens"] == theirs["num_trained_tokens"]
    gap = np.abs(np.concatenate(actual["logprobs"]) - np.concatenate(expected["logprobs"]))
    assert gap.mean() < LOGPROBS[precision]


def assert_same_change(name: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.norm() > 0
    assert (actual - expected).norm() / expected.norm() < CHANGE[kind(name)]


@pytest.mark.parametrize("name", list(CASES))
def test_one_gpu_computes_what_the_cpu_does_in_float32(one_rank: Any, device: str, name: str) -> None:
    here = one_rank.case("whole", device, name)
    assert_same_run(name, here, one_rank.case("exact", "cpu", name))
    assert_same_change(name, change(one_rank.folder, "whole", name), change(one_rank.folder, "exact", name))
    assert here["dtypes"] == ["torch.float32"]  # the masters, whatever is computed in
    if device == "cuda":
        assert here["devices"] == (["cpu"] if "offload" in name else ["cuda"])


def test_bfloat16_is_computed_in(one_rank: Any, device: str) -> None:
    """Else the tolerances above would prove nothing of it."""
    half, full = (one_rank.case("whole", device, name)["stats"][0]["loss"] for name in ("bf16", "fp32"))
    assert 1e-6 < abs(half - full) < LOSS["bf16"]


@pytest.mark.parametrize(("name", "plain"), [("bf16_checkpointing", "bf16"), ("bf16_offload", "bf16_adam")])
def test_what_saves_memory_changes_nothing(one_rank: Any, device: str, name: str, plain: str) -> None:
    saving, usual = (one_rank.case("whole", device, case)["stats"] for case in (name, plain))
    for ours, theirs in zip(saving, usual, strict=False):  # one made more updates
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    ours, theirs = change(one_rank.folder, "whole", name), change(one_rank.folder, "whole", plain)
    assert (ours - theirs).norm() / theirs.norm() < 0.02


@pytest.mark.parametrize("way", ["data", "sequence"])
@pytest.mark.parametrize("name", list(CASES))
def test_two_gpus_compute_what_one_does(two_ranks: Any, device: str, way: str, name: str) -> None:
    """By shares of the batch, or of each sequence (Ulysses)."""
    both, one = two_ranks.case(way, device, name), two_ranks.case("whole", device, name)
    assert_same_run(name, both, one)
    assert_same_change(name, change(two_ranks.folder, way, name), change(two_ranks.folder, "whole", name))
    other = two_ranks.case(way, device, name, rank=1)
    assert other["stats"] == both["stats"] and other["logprobs"] == both["logprobs"]


@pytest.mark.parametrize("name", SAVED)
@pytest.mark.parametrize("way", ["whole", "data", "sequence"])
def test_a_checkpoint_continues_on_another_number_of_gpus(two_ranks: Any, device: str, way: str, name: str) -> None:
    """Saved by one and continued by two, or the other way round: the third update is the same."""
    saved = two_ranks.case(way, device, name)
    resumed = two_ranks.case(f"resumed_{way}", device, name)
    assert_same_run(name, resumed, saved | {"stats": saved["stats"][-1:]})
