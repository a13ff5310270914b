"""Which curves a report shows, by metric name. Charts of metrics that no run has are left out."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

STAGES = ("rollout", "update", "sync", "proof", "eval", "save")  # the rest of a step is "other"


def line(
    title: str,
    about: str,
    *series: dict[str, Any],
    unit: str = "",
    scale: str = "linear",
    floor: float | None = None,
    ceiling: float | None = None,
) -> dict[str, Any]:
    """Return a chart of curves. The axis shows `floor` and `ceiling` even if no curve reaches them."""
    return {"kind": "line", "title": title, "about": about, "unit": unit, "scale": scale, "floor": floor,
            "ceiling": ceiling, "series": list(series)}  # fmt: skip


def curve(
    name: str, label: str, *, band: Sequence[str] = (), std: str = "", sparse: bool = False, exact: bool = False
) -> dict[str, Any]:
    """Return one curve of a chart.

    `band`: metrics of the lower and upper end of a band around it; `std`: metric of a deviation to either side;
    `sparse`: seldom measured, so its points are shown and joined over gaps; `exact`: free of noise, so never smoothed.
    """
    return {"name": name, "label": label, "band": list(band), "std": std, "sparse": sparse, "exact": exact or sparse}


def chart_specs(names: Iterable[str]) -> list[dict[str, Any]]:
    """Return the charts for runs that have these metrics."""
    known = set(names)
    charts = [*_outcome(known), *_training(), *_policy(), *_system()]
    for chart in charts:
        chart["series"] = [series for series in chart["series"] if series["name"] in known]
    return [chart for chart in charts if chart["series"]]


def _outcome(known: set[str]) -> list[dict[str, Any]]:
    charts = [
        line("Reward", "Mean over the step's rollouts; the band is one standard deviation to either side.",
             curve("reward/mean", "reward", std="reward/std"), floor=0.0),
    ]  # fmt: skip
    for name in sorted(name for name in known if name.startswith("eval/") and name.endswith("/accuracy")):
        prefix = name.removesuffix("/accuracy")
        passes = sorted(found for found in known if re.fullmatch(re.escape(prefix) + r"/pass_at_[^_]+", found))
        curves = [_evaluated(found, f"pass@{found.rsplit('_', 1)[-1]}") for found in passes]
        charts.append(
            line(f"Held-out accuracy: {prefix.removeprefix('eval/')}",
                 "Greedy answers to prompts never trained on, with 95 % intervals.",
                 _evaluated(name, "greedy"), *curves, floor=0.0, ceiling=1.0)
        )  # fmt: skip
    for environment in sorted({name.split("/")[1] for name in known if name.startswith("environment/")}):
        prefix = f"environment/{environment}/"
        measured = sorted(name for name in known if name.startswith(prefix))
        charts.append(
            line(f"Environment {environment}", "What it measured in evaluations of its own.",
                 *[curve(name, name.removeprefix(prefix), sparse=True) for name in measured])
        )  # fmt: skip
    return charts


def _evaluated(name: str, label: str) -> dict[str, Any]:
    return curve(name, label, band=(f"{name}_ci_low", f"{name}_ci_high"), sparse=True)


def _training() -> list[dict[str, Any]]:
    return [
        line("Response length", "Sampled tokens of a rollout.",
             curve("length/response_mean", "mean"), curve("length/response_max", "longest"), unit="tokens", floor=0.0),
        line("Truncated answers", "Share of rollouts that the token limit cut.",
             curve("length/truncated_fraction", "truncated"), floor=0.0),
        line("Groups that teach nothing", "Share of groups whose rewards are all equal, or that have one rollout.",
             curve("group/zero_variance_fraction", "zero variance"), curve("group/singleton_fraction", "singleton"),
             floor=0.0, ceiling=1.0),
        line("Policy loss", "Of the update, as the chosen loss defines it.", curve("loss/policy", "policy loss")),
        line("Gradient norm", "Before clipping.", curve("grad/norm", "gradient norm"), floor=0.0),
        line("Learning rate", "Of the update.", curve("lr", "learning rate", exact=True), floor=0.0),
    ]  # fmt: skip


def _policy() -> list[dict[str, Any]]:
    return [
        line("Entropy", "Mean per trained token.", curve("policy/entropy", "entropy"), unit="nats", floor=0.0),
        line("Mismatch KL", "Behaviour policy against trainer (k3) per trained token; 0 when on-policy and exact.",
             curve("policy/mismatch_kl", "mismatch KL"), unit="nats"),
        line("Logprob gap", "|trainer - sampler| of a trained token, log scale.",
             curve("policy/logprob_gap_mean", "mean"), curve("policy/logprob_gap_max", "largest"),
             unit="nats", scale="log"),
        line("Reference KL", "To the reference model, per trained token.",
             curve("policy/reference_kl", "reference KL"), unit="nats", floor=0.0),
        line("Clipping", "Share of trained tokens that the loss clipped, or whose importance weight hit its cap.",
             curve("policy/clip_fraction", "clipped"),
             curve("policy/importance_truncated_fraction", "importance capped"), floor=0.0),
        line("Policy lag", "Versions between the weights that sampled and those that trained.",
             curve("policy/version_lag_mean", "mean"), curve("policy/version_lag_max", "oldest"),
             unit="versions", floor=0.0),
        line("Sources", "Rollouts of the step by who sampled them.",
             curve("rollout/num_atropos", "Atropos"), curve("rollout/num_local", "local"),
             unit="rollouts", floor=0.0),
    ]  # fmt: skip


def _system() -> list[dict[str, Any]]:
    return [
        line("Throughput", "Prompt and sampled tokens per second of the step.",
             curve("throughput/tokens_per_s", "all tokens"), curve("throughput/trained_tokens_per_s", "trained tokens"),
             unit="tokens/s", floor=0.0),
        line("Canary gap after sync", "|engine - trainer| logprob on fixed prompts after each sync, log scale.",
             curve("sync/canary_gap_mean", "mean"), curve("sync/canary_gap_max", "largest"), unit="nats", scale="log"),
    ]  # fmt: skip
