"""A step as one line of text, and warnings for what happens for the first time."""

from collections import deque
from collections.abc import Iterator, Mapping

from atropos_exp.runs.summary import eval_accuracy
from atropos_exp.types import StepMetrics

_SPAN = 20  # recent steps that the time left is estimated from


class TimeLeft:
    """Estimates the seconds until the last step from the mean of recent steps, evaluation and saving included."""

    def __init__(self, total_steps: int) -> None:
        self._total_steps = total_steps
        self._recent: deque[float] = deque(maxlen=_SPAN)

    def after(self, metrics: StepMetrics) -> float | None:
        """Return the seconds that are left after a step; None before the first step."""
        seconds = metrics.values.get("time/step_s")
        if metrics.step > 0 and seconds is not None:
            self._recent.append(seconds)
        if not self._recent:
            return None
        return max(0, self._total_steps - metrics.step) * sum(self._recent) / len(self._recent)


class LiveFigures:
    """What stands beside the progress bar. Evaluation is rare, so its last value stays."""

    def __init__(self) -> None:
        self._accuracy: float | None = None

    def after(self, metrics: StepMetrics, left: float | None) -> str:
        """Return at most 80 columns, for example `reward 0.43 eval 0.61 lag 0 12.3k tok/s ETA 0:49`."""
        values = metrics.values
        if (accuracy := eval_accuracy(values)) is not None:
            self._accuracy = accuracy
        reward = values.get("reward/mean", float("nan"))
        parts = [f"reward {reward:.2f}"] if reward == reward else []
        if self._accuracy is not None:
            parts.append(f"eval {self._accuracy:.2f}")
        if "policy/version_lag_max" in values:
            parts.append(f"lag {values['policy/version_lag_max']:.0f}")
        if values.get("throughput/tokens_per_s"):
            parts.append(f"{values['throughput/tokens_per_s'] / 1000:.1f}k tok/s")
        if left is not None:
            parts.append(f"ETA {clock(left)}")
        return " ".join(parts)


def step_line(metrics: StepMetrics, *, total_steps: int, left: float | None) -> str:
    """Return a step as one line.

    For example `step 12/120  reward 0.43 ±0.49  eval 0.61  length 5.2  lag 0  12,345 tok/s  0.45 s  ETA 0:49`.
    """
    width = len(str(total_steps))
    return "  ".join([f"step {metrics.step:>{width}}/{total_steps}", *_figures(metrics, left)])


def _figures(metrics: StepMetrics, left: float | None) -> Iterator[str]:
    values = metrics.values
    reward = values.get("reward/mean", float("nan"))
    if reward == reward:
        yield f"reward {reward:.3f} ±{values.get('reward/std', 0.0):.2f}"
    accuracy = eval_accuracy(values)
    if accuracy is not None:
        yield f"eval {accuracy:.3f}"
    if "length/response_mean" in values:
        yield f"length {values['length/response_mean']:.1f}"
    if "policy/version_lag_max" in values:
        yield f"lag {values['policy/version_lag_max']:.0f}"
    if values.get("throughput/tokens_per_s"):
        yield f"{values['throughput/tokens_per_s']:,.0f} tok/s"
    if "time/step_s" in values:
        yield f"{values['time/step_s']:.2f} s"
    if left is not None:
        yield f"ETA {clock(left)}"


def clock(seconds: float) -> str:
    """Format seconds: 62.0 is `1:02`, 3601.0 is `1:00:01`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class FirstTimes:
    """Finds what deserves a warning the first time that it happens; the metrics go on counting."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def in_step(self, metrics: StepMetrics) -> list[str]:
        """Return the warnings that are new in this step."""
        news = []
        for subject, text in _warnings(metrics.values):
            if subject not in self._told:
                self._told.add(subject)
                news.append(f"step {metrics.step}: {text} (said once; metrics.jsonl counts on)")
        return news


def _warnings(values: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if name.startswith("rollout/dropped_") and value > 0:
            yield name, f"{value:.0f} rollouts dropped: {name.removeprefix('rollout/dropped_')}"
    if values.get("eval/reward_failures", 0) > 0:
        yield "eval", f"{values['eval/reward_failures']:.0f} held-out answers could not be scored and count as wrong"
    if values.get("update/skipped", 0) > 0:
        yield "skipped", "the loss or a gradient was not finite; the update was skipped"
    silent = values.get("group/zero_variance_fraction", 0) + values.get("group/singleton_fraction", 0)
    if silent >= 1 - 1e-9:
        yield "signal", "no group had rewards that differ, so nothing was learned"
    if values.get("length/truncated_fraction", 0) > 0.5:
        yield "truncated", f"{values['length/truncated_fraction']:.0%} of the answers were cut at max_response_length"
    if values.get("policy/importance_truncated_fraction", 0) > 0.1:
        share = values["policy/importance_truncated_fraction"]
        yield "importance", f"{share:.0%} of the tokens hit the importance cap: the rollouts are far off-policy"
