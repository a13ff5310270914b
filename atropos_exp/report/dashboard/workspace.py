"""The W&B workspace for GRPO, as code: sections, panels, and the step as the common axis."""

import importlib.util
import json
from dataclasses import dataclass
from typing import Any

from atropos_exp.errors import UserError

STEP = "step"
CLOSED = ("Weights in the engine",)  # sections that are folded at first
INSTALL = "pip install 'wandb-workspaces>=0.4.13'"


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """A line plot of metrics over steps."""

    title: str
    metrics: tuple[str, ...]
    smoothing: float = 0.0


def sections(eval_sets: tuple[str, ...]) -> dict[str, tuple[Panel, ...]]:
    """Return panels by section, in the order of questions: does it learn, is it healthy, where does the time go."""
    accuracy = tuple(f"eval/{name}/accuracy" for name in eval_sets)
    return {
        "Learning": (
            Panel(title="Reward", metrics=("reward/mean",), smoothing=0.5),
            Panel(title="Spread of rewards", metrics=("reward/std",), smoothing=0.5),
            Panel(title="Held-out accuracy", metrics=accuracy),
            Panel(title="Groups that teach nothing", metrics=("group/zero_variance_fraction",), smoothing=0.5),
        ),
        "Stability": (
            Panel(title="Entropy", metrics=("policy/entropy",)),
            Panel(title="Gradient norm", metrics=("grad/norm",)),
            Panel(title="Trainer against sampler", metrics=("policy/mismatch_kl", "policy/logprob_gap_mean")),
            Panel(title="Clipped tokens", metrics=("policy/clip_fraction",)),
            Panel(title="Capped importance weights", metrics=("policy/importance_truncated_fraction",)),
            Panel(title="KL to the reference", metrics=("policy/reference_kl",)),
            Panel(title="Loss", metrics=("loss/policy", "loss/total")),
            Panel(title="Learning rate", metrics=("lr",)),
        ),
        "Rollouts": (
            Panel(title="Answer length", metrics=("length/response_mean", "length/response_max")),
            Panel(title="Cut answers", metrics=("length/truncated_fraction",)),
            Panel(title="Age in updates", metrics=("policy/version_lag_mean", "policy/version_lag_max")),
            Panel(title="Sampled by", metrics=("rollout/num_atropos", "rollout/num_local")),
        ),
        "Weights in the engine": (
            Panel(title="Canary gap", metrics=("sync/canary_gap_max", "sync/canary_gap_mean")),
            Panel(title="Sync and proof", metrics=("time/sync_s", "time/proof_s")),
        ),
        "Speed": (
            Panel(title="A step", metrics=("time/step_s",)),
            Panel(title="Of it", metrics=("time/rollout_s", "time/update_s", "time/eval_s", "time/save_s")),
            Panel(title="Tokens a second", metrics=("throughput/tokens_per_s", "throughput/trained_tokens_per_s")),
        ),
    }


def build(*, entity: str, project: str, name: str, eval_sets: tuple[str, ...], by: str | None) -> Any:
    """Return the `wandb_workspaces` workspace. Raises UserError without that library.

    `by`: a key of the configuration, such as `advantage._target_`, whose values get one colour each, averaged over
    seeds.
    """
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise UserError(f"the workspace is built with wandb-workspaces, which is not installed; {INSTALL}")
    import wandb_workspaces.reports.v2 as reports
    import wandb_workspaces.workspaces as workspaces

    def plot(panel: Panel) -> Any:
        options: dict[str, Any] = {"groupby": f"config.{by}", "groupby_aggfunc": "mean"} if by else {}
        if panel.smoothing:
            options |= {"smoothing_type": "exponential", "smoothing_factor": panel.smoothing}
        return reports.LinePlot(title=panel.title, x=STEP, y=list(panel.metrics), **options)

    made = [
        workspaces.Section(name=title, is_open=title not in CLOSED, panels=[plot(panel) for panel in panels])
        for title, panels in sections(eval_sets).items()
    ]
    return workspaces.Workspace(
        name=name, entity=entity, project=project, sections=made, settings=workspaces.WorkspaceSettings(x_axis=STEP)
    )


def as_json(workspace: Any) -> dict[str, Any]:
    """Return what would be sent to the server, without sending it."""
    spec: dict[str, Any] = json.loads(workspace._to_model().model_dump_json(by_alias=True))
    return spec
