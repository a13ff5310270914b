from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atropos_exp import metrics
from atropos_exp.metrics import Clock, sentence, summarize
from atropos_exp.parts.eval.held_out import eval_metrics
from atropos_exp.types import Dropped, Finish, Rollout, RolloutGroup, StepFacts, SyncStats, UpdateStats
from tests.helpers.paths import ROOT


def rollout(*, reward: float, prompt: int = 2, response: int = 3, version: int = 4, **more: object) -> Rollout:
    length = prompt + response
    return Rollout(
        token_ids=np.arange(length, dtype=np.int32),
        trained=np.arange(length) >= prompt,
        logprobs=None,
        reward=reward,
        policy_version=version,
        **{"finish": Finish.STOP} | more,  # type: ignore[arg-type]
    )


def group(*rollouts: Rollout, source: str = "local") -> RolloutGroup:
    return RolloutGroup(prompt_id="p", source=source, rollouts=rollouts)


UPDATE = UpdateStats(
    loss=0.75, policy_loss=0.5, supervised_loss=0.125, grad_norm=2.0, learning_rate=1e-3, entropy=1.5,
    mismatch_kl=math.nan, logprob_gap_mean=0.01, logprob_gap_max=0.2, fresh_gap_mean=0.005, num_fresh_tokens=7,
    importance_truncated_fraction=0.1, clip_fraction=0.2, reference_kl=0.3, num_tokens=30, num_trained_tokens=20,
    num_micro_batches=2, peak_seconds=0.3, skipped=False,
)  # fmt: skip
SYNC = SyncStats(
    policy_version=6, num_tensors=10, num_bytes=4000, seconds=0.25, proof_seconds=0.05,
    seconds_by_part={"open": 0.01, "gather": 0.03, "send": 0.2, "commit": 0.01, "recheck": 0.0,
                     "digest": 0.03, "canary": 0.02},
    canary_gap_max=1e-5, canary_gap_mean=1e-6, canary_gap_allowed=2e-4, digests_compared=10,
)  # fmt: skip


def summarized(**facts: Any) -> Mapping[str, float]:
    """The metrics of a step, in which by default no time passed and nothing but a sync was done."""
    return summarize(StepFacts(**{"advantages": [], "sync": SYNC, "evaluation": {}, "seconds": {}} | facts)).values


def example_groups() -> list[RolloutGroup]:
    return [
        group(rollout(reward=1.0, response=3), rollout(reward=0.0, response=5, version=3, finish=Finish.LENGTH)),
        group(rollout(reward=1.0), rollout(reward=1.0)),  # equal rewards
        group(rollout(reward=0.0, prompt=4), source="atropos"),  # a singleton
        group(  # equal rewards, but the environment gave advantages
            rollout(reward=0.5, advantages=np.ones(5, np.float32)),
            rollout(reward=0.5, advantages=-np.ones(5, np.float32)),
        ),
    ]


def test_numbers_by_hand() -> None:
    values = summarized(
        step=6, groups=example_groups(), dropped=Dropped(reasons={"timeout": 3, "error:ValueError": 1}),
        update=UPDATE, seconds={"rollout": 1.0, "update": 0.75, "sync": 0.4, "step": 2.0},
        evaluation={"eval/arithmetic/accuracy": 0.5}, counters={"atropos/retries": 2},
    )  # fmt: skip
    rewards = [1.0, 0.0, 1.0, 1.0, 0.0, 0.5, 0.5]
    mean = sum(rewards) / 7
    assert values["reward/mean"] == pytest.approx(mean)
    assert values["reward/std"] == pytest.approx((sum((reward - mean) ** 2 for reward in rewards) / 7) ** 0.5)
    assert values["group/num"] == 4
    assert values["group/zero_variance_fraction"] == 0.25
    assert values["group/singleton_fraction"] == 0.25
    assert (values["rollout/num"], values["rollout/num_local"], values["rollout/num_atropos"]) == (7, 6, 1)
    assert values["rollout/num_tokens"] == 5 + 7 + 5 + 5 + 7 + 5 + 5
    assert (values["rollout/dropped_timeout"], values["rollout/dropped_error_ValueError"]) == (3, 1)
    assert values["policy/version"] == 5
    assert values["policy/version_lag_max"] == 2
    assert values["policy/version_lag_mean"] == pytest.approx(8 / 7)
    assert values["length/prompt_mean"] == pytest.approx((6 * 2 + 4) / 7)
    assert values["length/response_mean"] == pytest.approx((3 + 5 + 3 * 5) / 7)
    assert values["length/response_max"] == 5
    assert values["length/truncated_fraction"] == pytest.approx(1 / 7)
    assert values["throughput/tokens_per_s"] == pytest.approx(39 / 2.0)
    assert values["throughput/trained_tokens_per_s"] == pytest.approx(10.0)
    assert (values["time/sync_s"], values["time/proof_s"]) == (0.25, 0.05)  # the sync's own, proof apart
    assert (values["sync/send_s"], values["sync/digest_s"]) == (0.2, 0.03)
    assert (values["loss/policy"], values["loss/total"], values["grad/norm"], values["lr"]) == (0.5, 0.75, 2.0, 1e-3)
    assert math.isnan(values["policy/mismatch_kl"])
    assert (values["sync/bytes"], values["sync/canary_gap_max"]) == (4000, 1e-5)
    assert (values["loss/supervised"], values["rollout/supervised"]) == (0.125, 0)
    assert values["eval/arithmetic/accuracy"] == 0.5
    assert values["atropos/retries"] == 2


def test_examples_are_no_silent_groups() -> None:
    example = rollout(reward=1.0, supervised=True)
    groups = [
        group(example, example, example),  # equal rewards, yet every one teaches
        group(example),  # alone, likewise
        group(rollout(reward=0.0), rollout(reward=0.0), example),  # the two that are compared are equal
        group(rollout(reward=0.0), example),  # one to judge, and nothing to hold it against
        group(rollout(reward=0.0), rollout(reward=1.0)),
    ]
    values = summarized(step=5, groups=groups)
    assert (values["rollout/num"], values["rollout/supervised"]) == (11, 6)
    assert values["group/zero_variance_fraction"] == pytest.approx(1 / 5)
    assert values["group/singleton_fraction"] == pytest.approx(1 / 5)
    assert values["reward/mean"] == pytest.approx(7 / 11)


def test_every_name_has_a_sentence_and_every_value_is_a_float() -> None:
    values = summarized(
        step=1, groups=example_groups(), dropped=Dropped(reasons={"odd/reason here": 1}), update=UPDATE,
        seconds=Clock().seconds | {"update": 0.75},
        evaluation=eval_metrics(name="a/b", correct=np.array([True]), num_correct=np.array([3]), num_samples=4, k=2),
    )  # fmt: skip
    assert all(sentence(name) for name in values)
    assert all(type(value) is float for value in values.values())
    emitted = {name for name in metrics.METRICS if name in values}
    later = {"eval/reward_failures", "reward/rescored", "engine/restarts"}  # by evaluator, source and resync
    later |= {"policy/fresh_logprob_gap_allowed"}  # by the judge of the gap
    later |= {f"engine/memory_{what}_gb" for what in ("awake", "asleep", "freed")}
    stages = {name for name in metrics.METRICS if name.startswith("time/")}
    assert {name for name in metrics.METRICS if "<" not in name} - emitted - stages == later


def test_a_name_without_a_sentence_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"\['made/up'\]"):
        summarized(step=1, groups=[], counters={"made/up": 1.0})
    assert sentence("eval/gsm8k/pass_at_16_ci_low")
    assert sentence("eval/gsm8k/pass_at_many") is None
    assert sentence("rollout/dropped_") is None


def test_a_step_without_rollouts_has_no_reward() -> None:
    values = summarized(step=0, groups=[], seconds={"step": 1.0})
    assert math.isnan(values["reward/mean"])
    assert (values["rollout/num"], values["throughput/tokens_per_s"]) == (0, 0)
    assert "loss/policy" not in values


def test_eval_metrics_by_hand() -> None:
    values = eval_metrics(
        name="arithmetic", correct=np.array([True, False, True, True]), num_correct=np.array([4, 0, 2, 1]),
        num_samples=4, k=2,
    )  # fmt: skip
    assert values["eval/arithmetic/accuracy"] == 0.75
    # of the 6 pairs of 4 samples: with 4, 0, 2, 1 correct ones 6, 0, 5, 3 hold a correct one
    assert values["eval/arithmetic/pass_at_2"] == pytest.approx((6 + 0 + 5 + 3) / 24)
    assert values["eval/arithmetic/accuracy_ci_low"] < 0.75 < values["eval/arithmetic/accuracy_ci_high"]
    assert values["eval/arithmetic/pass_at_2_ci_low"] < 14 / 24 < values["eval/arithmetic/pass_at_2_ci_high"]
    assert "eval/x/pass_at_2" not in eval_metrics(name="x", correct=np.array([True]))
    assert math.isnan(eval_metrics(name="x", correct=np.zeros(0, np.bool_))["eval/x/accuracy"])


def test_clock_adds_spans_up_and_counts_a_stage_that_raised() -> None:
    clock = Clock()
    for _ in range(2):
        with clock("rollout"):
            time.sleep(0.02)
    with pytest.raises(KeyError), clock("update"):
        raise KeyError
    seconds = clock.seconds
    assert 0.04 <= seconds["rollout"] <= seconds["step"]
    assert set(seconds) == {"rollout", "update", "step"}
    with pytest.raises(AssertionError, match="time/lunch_s"), clock("lunch"):
        pass


def test_the_readme_table_lists_every_metric() -> None:
    command = [sys.executable, "-m", "atropos_exp.metrics"]
    root = Path(metrics.__file__).parents[1]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, cwd=root).stdout
    lines = printed.splitlines()
    assert len(lines) == 2 + len(metrics.METRICS)
    assert "| `grad/norm` | Global gradient norm before clipping. |" in lines


def test_the_documented_table_is_the_code_s():
    documented = (ROOT / "docs" / "metrics.md").read_text()
    assert documented.endswith(metrics.markdown_table() + "\n"), "python -m atropos_exp.metrics prints the new table"
