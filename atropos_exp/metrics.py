"""Every metric of a step: its name, the sentence that explains it, and how it is computed.

`python -m atropos_exp.metrics` prints the table of docs/metrics.md. Units stand in the name where they are not obvious;
a value that cannot be measured is NaN here and null in metrics.jsonl. Logprobs and entropies are in nats.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import perf_counter

import numpy as np

from atropos_exp.types import Finish, RolloutGroup, StepFacts, StepMetrics, SyncStats, UpdateStats

METRICS: Mapping[str, str] = {
    "reward/mean": "Mean reward of the rollouts.",
    "reward/std": "Standard deviation of the reward over all rollouts of the step.",
    "group/num": "Groups that reached the step.",
    "group/zero_variance_fraction": "Share of groups of several rollouts with equal rewards, which give no signal.",
    "group/singleton_fraction": "Share of groups with a single scored rollout, which cannot be compared with another.",
    "rollout/num": "Rollouts that reached the step.",
    "rollout/num_<source>": "Of these, sampled by this source (`local`, `atropos`).",
    "rollout/supervised": "Of these, trained on by plain cross-entropy; their rewards are not compared.",
    "rollout/of_unknown_version": "Of these, neither supervised nor known to the ledger: of weights that nobody knows.",
    "rollout/num_tokens": "Tokens of the rollouts, prompts included.",
    "rollout/dropped_<reason>": "Rollouts that were dropped for this reason before they reached a group.",
    "batch/num_tokens": "Packed tokens of the update, prompts included.",
    "batch/num_trained_tokens": "Tokens of the update that carry a loss.",
    "batch/num_micro_batches": "Forward and backward passes of the update on one rank.",
    "loss/policy": "Policy loss.",
    "loss/supervised": "Cross-entropy of the supervised rollouts, averaged like the policy loss; 0 without any.",
    "loss/total": "Policy loss plus `loss/supervised` plus the weighted KL to the reference model.",
    "grad/norm": "Global gradient norm before clipping.",
    "lr": "Learning rate of the update.",
    "update/skipped": "1 if the loss or a gradient was not finite, so that nothing was applied.",
    "policy/version": "Version of the weights that the step trained, before its update.",
    "policy/version_lag_mean": "Mean over rollouts of known version of `policy/version` minus that version.",
    "policy/version_lag_max": "The same, of the oldest rollout.",
    "policy/entropy": "Mean entropy of the policy per trained token, nats.",
    "policy/mismatch_kl": "k3 estimate of KL(behaviour || trained policy) per trained token, nats.",
    "policy/logprob_gap_mean": "Mean |trainer - sampler| of the logprob of a trained token, nats.",
    "policy/logprob_gap_max": "Largest |trainer - sampler| of the logprob of a trained token, nats.",
    "policy/fresh_logprob_gap_mean": "The mean of those that the very weights under training sampled: rounding alone.",
    "policy/fresh_logprob_gap_allowed": "What it may be (`sync.max_gap`): above, a warning, then the end of the run.",
    "policy/importance_truncated_fraction": "Share of trained tokens whose importance weight was cut to its cap.",
    "policy/clip_fraction": "Share of trained tokens that the policy loss clipped.",
    "policy/reference_kl": "KL to the reference model per trained token, nats; 0 without one.",
    "length/prompt_mean": "Mean tokens before the first sampled one.",
    "length/response_mean": "Mean sampled tokens of a rollout.",
    "length/response_max": "Most sampled tokens of a rollout.",
    "length/truncated_fraction": "Share of rollouts cut off by the token limit.",
    "time/rollout_s": "Seconds to get the groups: sampling, or waiting for Atropos.",
    "time/journal_s": "Seconds to write the groups to the rollout journal.",
    "time/advantage_s": "Seconds to compute advantages.",
    "time/pack_s": "Seconds to pack the batch.",
    "time/update_s": "Seconds of forward, backward and optimizer.",
    "time/sync_s": "Seconds to move the weights into the engine, without the proof.",
    "time/proof_s": "Seconds to prove that the weights arrived.",
    "time/eval_s": "Seconds of held-out evaluation.",
    "time/save_s": "Seconds to save a checkpoint.",
    "time/log_s": "Seconds that recording the previous step took.",
    "time/step_s": "Wall-clock seconds of the step; contains all of the above but `time/log_s`.",
    "throughput/tokens_per_s": "`rollout/num_tokens` per second of `time/step_s`: prompt and sampled tokens.",
    "throughput/trained_tokens_per_s": "`batch/num_trained_tokens` per second of `time/step_s`.",
    "throughput/mfu": "Model FLOPs of the update over the bfloat16 peak of the devices in `time/update_s`; GPUs only.",
    "reward/rescored": "Answers whose reward worker died, and that were scored once more for it, in this process.",
    "engine/restarts": "Restarts of engine servers that died or hung, each followed by a new sync, in this process.",
    "engine/memory_awake_gb": "GiB in use on the engine's GPU before it releases its memory (`engine.colocate`).",
    "engine/memory_asleep_gb": "GiB in use there afterwards: the trainer's memory, and what the engine keeps.",
    "engine/memory_freed_gb": "The difference: GiB that become available to the trainer for the update.",
    "sync/open_s": "Seconds of the sync until the engine has stopped sampling and accepts tensors.",
    "sync/gather_s": "Seconds to gather and cast the tensors; GPU work still running then counts in `sync/send_s`.",
    "sync/send_s": "Seconds to send the tensors to the engine and load them there.",
    "sync/commit_s": "Seconds until the engine has accepted the update and emptied its prefix cache.",
    "sync/recheck_s": "Seconds of the proof to compare what the engine still held of the last sync (`sync.recheck`).",
    "sync/digest_s": "Seconds of the proof to compute the digests on both sides and compare them.",
    "sync/canary_s": "Seconds of the proof to score the canary prompts on both sides.",
    "sync/tensors": "Tensors that the engine received.",
    "sync/bytes": "Bytes that the engine received.",
    "sync/digests_compared": "Tensors whose digest in the engine was compared with the trainer's.",
    "sync/canary_gap_mean": "Mean |engine - trainer| logprob on the canary prompts after the sync, nats.",
    "sync/canary_gap_max": "Largest |engine - trainer| logprob on the canary prompts after the sync, nats.",
    "sync/canary_gap_allowed": "What the mean might be: learned from the first proven syncs (`sync.tolerance`).",
    "eval/<set>/accuracy": "Greedy accuracy on this held-out set.",
    "eval/<set>/accuracy_ci_low": "Lower end of its 95 % interval over problems.",
    "eval/<set>/accuracy_ci_high": "Upper end of its 95 % interval over problems.",
    "eval/<set>/pass_at_<k>": "Unbiased estimate that one of k samples is correct.",
    "eval/<set>/pass_at_<k>_ci_low": "Lower end of its 95 % interval over problems.",
    "eval/<set>/pass_at_<k>_ci_high": "Upper end of its 95 % interval over problems.",
    "eval/<set>/num": "Prompts of the held-out set.",
    "eval/<set>/num_distinct": "Different ones among them; the intervals count each once.",
    "eval/reward_failures": "Held-out answers that could not be scored; they count as wrong.",
    "atropos/<counter>": "A total of this process: batches, groups by fate, restarts, outages (docs/atropos.md).",
    "environment/<name>/<metric>": "What this process of an environment measured in an evaluation of its own.",
    "gateway/<counter>": "Total or gauge of the gateway: requests, tokens, refusals, ledger (docs/atropos.md).",
}


def _pattern(name: str) -> re.Pattern[str]:
    pattern = re.sub(r"<\w+>", "[^/]+", re.escape(name).replace("<k>", r"\d+"))
    return re.compile(pattern)


EQUAL_WITHIN = 1e-12  # of the largest: rewards that differ by less are equal, as to `parts/advantage/base.py`
_PATTERNS = [(_pattern(name), said) for name, said in METRICS.items() if "<" in name]


def sentence(name: str) -> str | None:
    """Return the sentence that explains the metric `name`; None if there is no such metric."""
    if name in METRICS:
        return METRICS[name]
    return next((said for pattern, said in _PATTERNS if pattern.fullmatch(name)), None)


def slug(text: str) -> str:
    """Return `text` as one part of a metric's name; characters that would break the name become underscores."""
    return re.sub(r"[^\w.+-]+", "_", text).strip("_") or "unnamed"


class Clock:
    """The seconds of one step by stage. Every step has a new clock.

    clock = Clock()
    with clock("rollout"):
        groups, dropped = source.take(16, step=1)
    clock.seconds  # {"rollout": 1.2, "step": 1.3}
    """

    def __init__(self) -> None:
        self._stages: dict[str, float] = {}
        self._start = perf_counter()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Measure a stage, the X of a `time/X_s`. Several spans of one stage add up."""
        assert f"time/{stage}_s" in METRICS, f"no metric is called time/{stage}_s"
        start = perf_counter()
        try:
            yield
        finally:
            self._stages[stage] = self._stages.get(stage, 0.0) + perf_counter() - start

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by stage so far, and `step`: all since the clock was made."""
        return self._stages | {"step": perf_counter() - self._start}


def summarize(facts: StepFacts) -> StepMetrics:
    """One step's metrics. Those of an update are left out if there was none."""
    update, seconds = facts.update, facts.seconds
    values: dict[str, float] = {"policy/version": facts.policy_version}
    values |= _of_groups(facts.groups, facts.policy_version)
    values |= {f"rollout/dropped_{slug(reason)}": num for reason, num in facts.dropped.reasons.items()}
    if update is not None:
        values |= _of_update(update)
    values |= {f"time/{stage}_s": spent for stage, spent in seconds.items()}
    values |= _of_sync(facts.sync)  # after the clock's, whose span of the sync holds the proof too
    if seconds.get("step", 0.0) > 0.0:
        values["throughput/tokens_per_s"] = values["rollout/num_tokens"] / seconds["step"]
        values["throughput/trained_tokens_per_s"] = (update.num_trained_tokens if update else 0) / seconds["step"]
    if update is not None and seconds.get("update") and update.peak_seconds == update.peak_seconds:
        values["throughput/mfu"] = update.peak_seconds / seconds["update"]
    values |= {**facts.evaluation, **facts.counters}
    unknown = [name for name in values if sentence(name) is None]
    assert not unknown, f"metrics without a sentence in metrics.METRICS: {unknown}"
    return StepMetrics(step=facts.step, values={name: float(value) for name, value in values.items()})


def markdown_table() -> str:
    """Return every metric with its sentence, as docs/metrics.md shows them."""
    pipe = r"\|"  # a bare one would end the cell
    rows = [f"| `{name}` | {said.replace('|', pipe)} |" for name, said in METRICS.items()]
    return "\n".join(["| metric | what it says |", "| --- | --- |", *rows])


def _of_groups(groups: Sequence[RolloutGroup], policy_version: int) -> dict[str, float]:
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    values: dict[str, float] = {
        "group/num": len(groups),
        "rollout/num": len(rollouts),
        "rollout/supervised": sum(rollout.supervised for rollout in rollouts),
        "rollout/of_unknown_version": sum(not (rollout.by_engine or rollout.supervised) for rollout in rollouts),
        "rollout/num_tokens": sum(len(rollout.token_ids) for rollout in rollouts),
    }
    by_source = Counter(slug(group.source) for group in groups for _ in group.rollouts)
    values |= {f"rollout/num_{source}": num for source, num in by_source.items()}
    if not rollouts:
        return values | {"reward/mean": float("nan")}
    rewards_N = np.array([rollout.reward for rollout in rollouts], dtype=np.float64)
    lags = [float(policy_version - rollout.policy_version) for rollout in rollouts if rollout.by_engine]
    responses_N = np.array([rollout.num_trained for rollout in rollouts])
    judged = [np.array([rollout.reward for rollout in group.compared], dtype=np.float64) for group in groups]
    flat = [
        len(rewards_G) > 1
        and not group.has_own_advantages
        and float(np.ptp(rewards_G)) <= EQUAL_WITHIN * float(np.abs(rewards_G).max())
        for group, rewards_G in zip(groups, judged, strict=True)
    ]
    return values | {
        "reward/mean": rewards_N.mean(),
        "reward/std": rewards_N.std(),
        "group/zero_variance_fraction": float(np.mean(flat)),
        "group/singleton_fraction": float(np.mean([len(rewards_G) == 1 for rewards_G in judged])),
        "policy/version_lag_mean": float(np.mean(lags or [np.nan])),
        "policy/version_lag_max": max(lags, default=np.nan),
        "length/prompt_mean": float(np.mean([np.argmax(rollout.trained) for rollout in rollouts])),
        "length/response_mean": responses_N.mean(),
        "length/response_max": responses_N.max(),
        "length/truncated_fraction": float(np.mean([rollout.finish is Finish.LENGTH for rollout in rollouts])),
    }


def _of_update(update: UpdateStats) -> dict[str, float]:
    return {
        "batch/num_tokens": update.num_tokens,
        "batch/num_trained_tokens": update.num_trained_tokens,
        "batch/num_micro_batches": update.num_micro_batches,
        "loss/policy": update.policy_loss,
        "loss/supervised": update.supervised_loss,
        "loss/total": update.loss,
        "grad/norm": update.grad_norm,
        "lr": update.learning_rate,
        "update/skipped": update.skipped,
        "policy/entropy": update.entropy,
        "policy/mismatch_kl": update.mismatch_kl,
        "policy/logprob_gap_mean": update.logprob_gap_mean,
        "policy/logprob_gap_max": update.logprob_gap_max,
        "policy/fresh_logprob_gap_mean": update.fresh_gap_mean,
        "policy/importance_truncated_fraction": update.importance_truncated_fraction,
        "policy/clip_fraction": update.clip_fraction,
        "policy/reference_kl": update.reference_kl,
    }


def _of_sync(sync: SyncStats) -> dict[str, float]:
    return {
        "time/sync_s": sync.seconds,
        "time/proof_s": sync.proof_seconds,
        **{f"sync/{part}_s": spent for part, spent in sync.seconds_by_part.items()},
        "sync/tensors": sync.num_tensors,
        "sync/bytes": sync.num_bytes,
        "sync/digests_compared": sync.digests_compared,
        "sync/canary_gap_mean": sync.canary_gap_mean,
        "sync/canary_gap_max": sync.canary_gap_max,
        "sync/canary_gap_allowed": sync.canary_gap_allowed,
    }


if __name__ == "__main__":
    print(markdown_table())
