"""What the metrics of a run show: each finding with its figures and steps."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, median, pvariance
from typing import Any

from atropos_exp.doctor.line import Line, ok, warn
from atropos_exp.runs.files import Row
from atropos_exp.runs.summary import eval_accuracy

MIN_STEPS = 8  # below, a curve says nothing
HIGH_REWARD = 0.9


class Curve:
    """One metric over the steps that have it, with its first and last quarter (at least three points each)."""

    def __init__(self, rows: Sequence[Row], name: str) -> None:
        self.name = name
        self.points = [(row.step, float(value)) for row in rows if (value := row.get(name)) is not None and row.step]
        size = max(3, len(self.points) // 4)
        self.first = [value for _, value in self.points[:size]]
        self.last = [value for _, value in self.points[-size:]]

    def __bool__(self) -> bool:
        return len(self.points) >= MIN_STEPS

    @property
    def start(self) -> float:
        """Mean of the first quarter."""
        return fmean(self.first)

    @property
    def end(self) -> float:
        """Mean of the last quarter."""
        return fmean(self.last)

    @property
    def noise(self) -> float:
        """Standard error of `end - start`."""
        return math.sqrt(pvariance(self.first) / len(self.first) + pvariance(self.last) / len(self.last))

    def told(self, digits: int = 3) -> str:
        """Return the curve in words: "reward/mean 0.31 (steps 1-5) -> 0.32 (steps 16-20)"."""
        steps = [step for step, _ in self.points]
        size = len(self.first)
        return (
            f"{self.name} {self.start:.{digits}g} (steps {steps[0]}-{steps[size - 1]}) -> "
            f"{self.end:.{digits}g} (steps {steps[-size]}-{steps[-1]})"
        )

    def above(self, bound: float) -> list[int]:
        """Return the steps at which the metric is above `bound`."""
        return [step for step, value in self.points if value > bound]


def judge_curves(rows: Sequence[Row], config: Mapping[str, Any]) -> list[Line]:
    """Return a line for every finding in the curves; with fewer than `MIN_STEPS` steps, a line that says so."""
    reward = Curve(rows, "reward/mean")
    if not reward:
        return [ok("curves", f"{len(reward.points)} steps are too few to judge a curve (from {MIN_STEPS} on)")]
    found = [
        _reward(reward),
        _entropy(rows, reward),
        *_variance(rows, reward),
        _truncation(rows, config.get("max_response_length")),
        *_mismatch(rows),
        _lag(rows),
        *_updates(rows),
        _held_out(rows, reward),
    ]
    return [line for line in found if line is not None]


def _reward(reward: Curve) -> Line:
    change, told = reward.end - reward.start, reward.told()
    if max(value for _, value in reward.points) <= 0:
        return warn(
            "reward",
            f"no rollout ever scored: {told}",
            "read samples/: does the answer have the form that the reward wants? An easier task or a model "
            "that knows it now and then; `doctor` with the run's overrides tries the reward on reference answers",
        )
    if change < -2 * reward.noise and reward.noise > 0:
        remedy = "lower trainer.learning_rate; see entropy, mismatch and grad/norm below"
        return warn("reward", f"falls: {told}", remedy)
    if change <= 2 * reward.noise and reward.end < HIGH_REWARD:
        return warn(
            "reward",
            f"flat: {told}, within two standard errors ({2 * reward.noise:.2g})",
            "a higher trainer.learning_rate (3x), more steps, a larger group_size or batch_size; see zero-variance "
            "groups",
        )
    return ok("reward", told)


def _entropy(rows: Sequence[Row], reward: Curve) -> Line | None:
    entropy = Curve(rows, "policy/entropy")
    if not entropy:
        return None
    if entropy.end < 0.2 * entropy.start and reward.end < HIGH_REWARD:
        return warn(
            "entropy",
            f"collapsed: {entropy.told()} while the reward is {reward.end:.3g}",
            "lower trainer.learning_rate, loss.clip_high=0.28, loss.kl_coef=0.001, or a higher temperature",
        )
    if entropy.end > 2 * entropy.start and entropy.end > 1 and reward.end <= reward.start:
        text = f"grows without reward: {entropy.told()}"
        return warn("entropy", text, "lower trainer.learning_rate, loss.kl_coef=0.001")
    return ok("entropy", entropy.told())


def _variance(rows: Sequence[Row], reward: Curve) -> list[Line]:
    share, lines = Curve(rows, "group/zero_variance_fraction"), []
    is_easy, is_solved = reward.end > 0.5, reward.end >= HIGH_REWARD and reward.end > reward.start
    if share and share.end > 0.7 and not is_solved:
        remedy = "easier prompts, a larger group_size, or a higher temperature: nearly every answer is wrong"
        if is_easy:
            remedy = "harder prompts: the policy solves nearly all of them"
        lines.append(warn("groups", f"most teach nothing, all rewards equal: {share.told()}", remedy))
    single = Curve(rows, "group/singleton_fraction")
    if single and single.end > 0.05:
        remedy = "group_size of at least 4; see what is dropped"
        lines.append(warn("groups", f"too small to compare: {single.told()}", remedy))
    return lines or _healthy("groups", share)


def _truncation(rows: Sequence[Row], limit: int | None) -> Line | None:
    cut = Curve(rows, "length/truncated_fraction")
    if not cut:
        return None
    if cut.end <= 0.2:
        return ok("length", cut.told())
    return warn(
        "length",
        f"answers are cut at max_response_length={limit}: {cut.told()}",
        "raise max_response_length, ask for shorter answers (data.system_prompt), or rollout.mask_truncated=true",
    )


def _mismatch(rows: Sequence[Row]) -> list[Line]:
    lines, kl = [], Curve(rows, "policy/mismatch_kl")
    for curve in (kl, Curve(rows, "policy/logprob_gap_mean")):
        if curve and curve.end > 3 * max(curve.start, 1e-12) and curve.end > 5e-3:
            remedy = (
                "engine.dtype=float32 to see whether it is rounding; fewer stale rollouts "
                "(atropos.max_version_lag=1); keep trainer.importance_cap"
            )
            lines.append(warn("mismatch", f"trainer and sampler drift apart: {curve.told()}", remedy))
            break
    capped = Curve(rows, "policy/importance_truncated_fraction")
    if capped and capped.end > 0.05:
        remedy = "fresher rollouts (atropos.max_version_lag), a lower trainer.learning_rate"
        lines.append(warn("mismatch", f"importance weights hit their cap: {capped.told()}", remedy))
    return lines or _healthy("mismatch", kl)


def _lag(rows: Sequence[Row]) -> Line | None:
    lag = Curve(rows, "policy/version_lag_mean")
    if not lag:
        return None
    if lag.end <= 2:
        return ok("lag", lag.told())
    oldest = max(value for _, value in Curve(rows, "policy/version_lag_max").points)
    return warn(
        "lag",
        f"rollouts are old when trained on: {lag.told()}, the oldest {oldest:.0f} updates",
        "atropos.max_version_lag=2, env.max_batches_offpolicy=1, fewer environment processes",
    )


def _updates(rows: Sequence[Row]) -> list[Line]:
    lines = []
    if skipped := Curve(rows, "update/skipped").above(0):
        text = f"{len(skipped)} were skipped, loss or gradient not finite: steps {spans(skipped)}"
        remedy = "lower trainer.learning_rate, model.dtype=float32; bad_batches/ of the run folder has the batches"
        lines.append(warn("updates", text, remedy))
    grad = Curve(rows, "grad/norm")
    usual = median(value for _, value in grad.points) if grad else 0.0
    spikes = grad.above(10 * usual) if usual > 0 else []
    if spikes:
        text = f"gradient norm above ten times its median ({usual:.3g}) at steps {spans(spikes)}"
        lines.append(warn("updates", text, "lower trainer.max_grad_norm or trainer.learning_rate"))
    clipped = Curve(rows, "policy/clip_fraction")
    if clipped and clipped.end > 0.3:
        remedy = "fewer trainer.num_mini_batches, or a lower rate"
        lines.append(warn("updates", f"the loss clips much: {clipped.told()}", remedy))
    return lines or _healthy("updates", grad)


def _held_out(rows: Sequence[Row], reward: Curve) -> Line | None:
    scores = [(row.step, score) for row in rows if (score := eval_accuracy(row)) is not None]
    if len(scores) < 2:
        return None
    (first, before), (last, now) = scores[0], scores[-1]
    told = f"held-out accuracy {before:.3f} (step {first}) -> {now:.3f} (step {last})"
    rises = reward.end - reward.start > 2 * reward.noise
    if rises and now < before - 0.02:
        remedy = "read samples/: the policy may have found a way around the reward; more data, fewer epochs"
        return warn("eval", f"falls while the reward rises: {told}", remedy)
    return ok("eval", told)


def _healthy(topic: str, curve: Curve) -> list[Line]:
    return [ok(topic, curve.told())] if curve else []


def spans(steps: Sequence[int]) -> str:
    """Return steps as text, such as "3-5, 9"; at most six spans."""
    parts: list[list[int]] = []
    for step in sorted(steps):
        if parts and step == parts[-1][1] + 1:
            parts[-1][1] = step
        else:
            parts.append([step, step])
    texts = [str(a) if a == b else f"{a}-{b}" for a, b in parts]
    return ", ".join(texts[:6]) + (f" and {len(texts) - 6} more" if len(texts) > 6 else "")
