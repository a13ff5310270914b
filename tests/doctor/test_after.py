"""Folders of runs with one planted trouble each: it is named with figures and steps, and nothing else is."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from atropos_exp.doctor.after import explain
from atropos_exp.doctor.curves import spans
from atropos_exp.doctor.line import Level, Line
from atropos_exp.runs.files import RunFiles, read_rows, write_summary
from atropos_exp.runs.summary import summarize_run
from atropos_exp.types import StepMetrics
from tests.helpers.paths import ROOT

STEPS = 20
Values = Callable[[int], dict[str, float]]


def healthy(step: int) -> dict[str, float]:
    """A run that learns, a little noisily."""
    wave = 0.01 * math.sin(3 * step)
    return {
        "reward/mean": 0.3 + 0.03 * step + wave, "policy/entropy": 1.0 - 0.01 * step, "grad/norm": 1.0 + wave,
        "group/zero_variance_fraction": 0.3, "group/singleton_fraction": 0.0, "length/truncated_fraction": 0.02,
        "policy/mismatch_kl": 1e-4, "policy/logprob_gap_mean": 1e-3, "policy/version_lag_mean": 0.0,
        "policy/fresh_logprob_gap_mean": 1e-3, "policy/fresh_logprob_gap_allowed": 2e-3,
        "policy/version_lag_max": 0.0, "policy/importance_truncated_fraction": 0.0, "policy/clip_fraction": 0.01,
        "update/skipped": 0.0, "rollout/num": 512.0, "rollout/num_atropos": 512.0, "rollout/num_tokens": 6000.0,
        "time/step_s": 2.0, "time/rollout_s": 1.2, "time/update_s": 0.6, "time/sync_s": 0.1, "time/proof_s": 0.05,
        "sync/bytes": 1000.0, "sync/canary_gap_max": 1e-6,
    }  # fmt: skip


def write_run(folder: Path, changed: Values = lambda step: {}, *, status: str | None = "finished", **more: Any) -> Path:
    files = RunFiles(folder, first_step=0)
    files.log(StepMetrics(step=0, values={"eval/arithmetic/accuracy": 0.3, "sync/bytes": 1000.0}))
    for step in range(1, STEPS + 1):
        last = {"eval/arithmetic/accuracy": 0.8} if step == STEPS else {}
        files.log(StepMetrics(step=step, values=healthy(step) | last | changed(step)))
    (folder / "run.json").write_text('{"config_hash": "x"}')
    (folder / "config.yaml").write_text(
        "max_response_length: 8\ntrainer: {max_steps: 20}\n"
        "rollout: {_target_: atropos_exp.parts.rollout.auto.AutoRollout, mask_truncated: false}\n"
    )
    if status is not None:
        given: dict[str, Any] = {"error": None, "num_failed_syncs": 0} | more
        write_summary(
            folder,
            summarize_run(
                read_rows(folder), status=status, policy_version=STEPS, resumed_from=None, seed=0, git=None,
                versions={}, config_hash="x", **given,
            ),
        )  # fmt: skip
    return folder


def troubles(lines: list[Line]) -> list[Line]:
    return [line for line in lines if line.level is not Level.ok]


def test_a_healthy_run_is_all_ok(tmp_path: Path) -> None:
    lines = explain(write_run(tmp_path))
    assert troubles(lines) == []
    said = "\n".join(map(str, lines))
    assert "finished after 20 of 20 steps" in said
    assert "held-out accuracy 0.300 (step 0) -> 0.800 (step 20)" in said
    assert "2.00 s a step: rollout 60%, update 30%, sync 5%" in said  # 1.2, 0.6, 0.1, 0.05 of 2 s
    assert "none of 10240 rollouts" in said


def test_a_slow_start_is_no_trouble(tmp_path: Path) -> None:
    slow = {"time/step_s": 30.0, "time/rollout_s": 29.2}
    lines = explain(write_run(tmp_path, lambda step: slow if step == 1 else {}))
    assert troubles(lines) == []
    assert "2.00 s a step: rollout 76%" in "\n".join(map(str, lines))  # (19 x 1.2 + 29.2) / (19 x 2 + 30)


def late(step: int, before: float, after: float) -> float:
    return before if step <= STEPS // 2 else after


@pytest.mark.parametrize(
    ("changed", "topic", "said", "remedy"),
    [
        (lambda s: {"reward/mean": 0.4 + 0.02 * (-1) ** s}, "reward", "flat: reward/mean 0.396", "learning_rate"),
        (lambda s: {"reward/mean": 0.0}, "reward", "no rollout ever scored", "samples/"),
        (lambda s: {"reward/mean": 0.9 - 0.03 * s, "eval/arithmetic/accuracy": 0.3}, "reward", "falls",
         "learning_rate"),
        (lambda s: {"policy/entropy": 1.0 / s**2, "reward/mean": 0.3 + 0.01 * s}, "entropy", "collapsed", "clip_high"),
        (lambda s: {"group/zero_variance_fraction": late(s, 0.5, 0.95), "reward/mean": 0.01 * s}, "groups",
         "0.5 (steps 1-5) -> 0.95 (steps 16-20)", "easier prompts"),
        (lambda s: {"group/zero_variance_fraction": 0.8, "reward/mean": 0.7 + 0.005 * s}, "groups", "0.8",
         "harder prompts"),
        (lambda s: {"group/singleton_fraction": 0.5}, "groups", "too small to compare", "group_size"),
        (lambda s: {"length/truncated_fraction": late(s, 0.1, 0.6)}, "length", "max_response_length=8", "raise"),
        (lambda s: {"policy/mismatch_kl": 1e-3 * 1.3**s}, "mismatch", "drift apart", "engine.dtype=float32"),
        (lambda s: {"policy/fresh_logprob_gap_mean": 0.21 if s in (5, 6) else 1e-5}, "gap",
         "at steps 5-6: 0.21 nats at step 5, 0.002 are allowed", "engine.dtype=float32"),
        (lambda s: {"policy/logprob_gap_mean": 0.38, "policy/fresh_logprob_gap_mean": math.nan,
                    "policy/fresh_logprob_gap_allowed": math.nan}, "gap",  # as before there was a limit
         "at steps 1-20: 0.38 nats at step 1, 0.3 are allowed", "layout=rows"),
        (lambda s: {"policy/importance_truncated_fraction": 0.2}, "mismatch", "hit their cap", "max_version_lag"),
        (lambda s: {"policy/version_lag_mean": 5.0, "policy/version_lag_max": 9.0}, "lag", "oldest 9 updates",
         "max_version_lag"),
        (lambda s: {"update/skipped": float(s in (4, 5, 9))}, "updates", "3 were skipped", "bad_batches/"),
        (lambda s: {"grad/norm": 50.0 if s == 7 else 1.0}, "updates", "at steps 7", "max_grad_norm"),
        (lambda s: {"policy/clip_fraction": 0.5}, "updates", "clips much", "num_mini_batches"),
        (lambda s: {"time/sync_s": 1.0, "time/rollout_s": 0.3}, "time", "sync takes 50%", "engine.transport=shm"),
        (lambda s: {"time/step_s": 30.0, "time/rollout_s": 29.0} if s == 13 else {}, "time",
         "steps 13 took more than three times the usual 2.00 s; the slowest, 13, 30.00 s, of it 29.00 s in rollout",
         "log/"),
        (lambda s: {"rollout/dropped_timeout": 200.0} if s in (3, 4) else {}, "drops", "400 timeout (steps 3-4)",
         "reward.timeout_seconds"),
        (lambda s: {"rollout/num_local": 512.0, "rollout/num_atropos": 0.0} if s in (8, 9, 12) else {}, "source",
         "3 of 20 steps were sampled locally", "atropos_api.log"),
        (lambda s: {"atropos/lost_batches": late(s, 0, 2)}, "atropos", "2 batches that the API sent",
         "docs/atropos.md"),
        (lambda s: {"atropos/environment_restarts": late(s, 0, 4)}, "atropos", "first at step 11", "log/"),
        (lambda s: {"atropos/groups_dropped_stale": 7.0}, "atropos", "7 groups refused (stale)", "log/"),
        (lambda s: {"eval/arithmetic/accuracy": 0.1} if s == 20 else {}, "eval", "falls while the reward rises",
         "samples/"),
    ],
)  # fmt: skip
def test_each_planted_trouble_is_the_one_that_is_named(
    changed: Values, topic: str, said: str, remedy: str, tmp_path: Path
) -> None:
    (line,) = troubles(explain(write_run(tmp_path, changed)))
    assert (line.topic, line.level) == (topic, Level.warn)
    assert said in line.text
    assert remedy in line.remedy


def test_a_failed_run(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "traceback_rank_0.txt").write_text("Traceback")
    (line,) = troubles(explain(write_run(tmp_path, status="failed", error="EngineError: it died")))
    assert line.level is Level.fail and "EngineError: it died" in line.text and "traceback_rank_0.txt" in line.remedy


def test_a_killed_run(tmp_path: Path) -> None:
    (line,) = troubles(explain(write_run(tmp_path, status=None)))
    assert "without a summary after 20 of 20 steps" in line.text and "same command continues" in line.remedy


def test_a_sync_that_was_not_proven(tmp_path: Path) -> None:
    (line,) = troubles(explain(write_run(tmp_path, num_failed_syncs=1)))
    assert line.level is Level.fail and "1 of 22 weight syncs" in line.text


def test_the_command_and_its_exit_code(tmp_path: Path) -> None:
    write_run(tmp_path, lambda step: {"length/truncated_fraction": 0.9})
    done = subprocess.run(
        [sys.executable, "-m", "atropos_exp.doctor", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "")
    assert "warn  length" in done.stdout and "-> raise max_response_length" in done.stdout
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "finished"
    elsewhere = subprocess.run(
        [sys.executable, "-m", "atropos_exp.doctor", str(tmp_path / "..")],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert elsewhere.returncode == 2 and "is no run folder" in elsewhere.stdout


def test_steps_in_few_words() -> None:
    assert spans([5, 3, 4, 9]) == "3-5, 9"
    assert spans(list(range(0, 20, 2))) == "0, 2, 4, 6, 8, 10 and 4 more"
