"""A run of the trainer as the suite sees it: its command line and its files."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atropos_exp.parts.model.tiny import WEIGHTS
from atropos_exp.runs.journal import read_journal
from atropos_exp.types import RolloutGroup
from tests.helpers.paths import ROOT

VOCABULARY = 384
PROGRAMS = {
    "api": "atroposlib.cli.run_api",
    "environment": "atropos_exp.envs.",
    "gateway": "atropos_exp.parts.gateway.server",
    "engine": "atropos_exp.parts.engine.hf.server",
}
SMALL = (
    "batch_size=2",
    "group_size=4",
    "max_prompt_length=128",
    "max_response_length=8",
    "eval.num_prompts=0",
    "eval.every=0",
    "sync.canary_prompts=1",
    "engine.num_threads=1",
)
LOSSES = {
    "policy": "loss/policy",
    "supervised": "loss/supervised",
    "kl": "policy/reference_kl",
    "total": "loss/total",
    "grad_norm": "grad/norm",
}


@dataclass(frozen=True, kw_only=True)
class Request:
    """One run of the trainer: 2 groups of 4 sequences a step; sequences of at most 136 tokens, completions of 8; no
    evaluation."""

    folder: Path  # of the run; the same again resumes it
    steps: int
    api_url: str | None = None  # None: the trainer starts API and environments itself
    gateway_port: int | None = None  # where environments find the inference server; None: any
    falls_back: bool = False  # to its own rollouts while the API is silent or gone
    data_timeout: float = 120.0  # seconds without a batch although the API answers
    outage_timeout: float = 4.0  # seconds without the API, before it falls back
    start_timeout: float = 240.0  # seconds until the first batch
    take_over: bool = False  # of an API that serves another run
    max_version_lag: int | None = None
    kl_coef: float = 0.0
    learning_rate: float = 2e-4
    temperature: float = 1.0  # of training rollouts
    keeps_weights: bool = False  # of every step
    environment: Sequence[str] = ()  # command of the environment to be started; (): the single-turn one
    multi_turn: bool = False  # start the multi-turn environment instead
    environment_arguments: dict[str, Any] = field(default_factory=dict)  # --env.KEY VALUE
    num_processes: int = 1  # of the environment
    max_restarts: int = 5  # of an environment
    num_ranks: int = 1
    logs_to_wandb: bool = False  # offline


@dataclass(frozen=True, kw_only=True)
class TrainedSequence:
    """One trained sequence. Lists of one length; logprobs in nats."""

    tokens: list[int]
    trained: list[bool]
    logprobs: list[float] | None  # of the behaviour policy, 0.0 where not trained
    advantages: list[float] | None  # of the environment
    reward: float
    policy_version: int
    zero_advantage: bool
    supervised: bool
    temperature: float | None
    group_id: str
    source: str  # "atropos" or "local"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One update. `losses`: policy, supervised, kl (per trained token), total, grad_norm (before clipping)."""

    step: int
    groups: list[list[TrainedSequence]]
    losses: dict[str, float]
    log: dict[str, float]  # its whole line of metrics.jsonl


CAUSES = {
    "nobody has registered": "no environment has registered",
    "a silent environment": "environments have registered and send nothing",
    "a minimum allocation": "minimum allocation .* Nothing is queued of environment 1",
    "sizes that do not divide": "sizes divide the largest",
    "sequences that are too long": "drops its groups because a sequence has 137 tokens or more",
    "an environment that does not start": r"environment external ended with exit code 3, 2 times in a row",
}


def command(request: Request) -> tuple[list[str], dict[str, str]]:
    overrides = {
        "output_dir": request.folder.parent,
        "run_dir": request.folder,
        "rollout": "auto" if request.falls_back else "atropos",
        "trainer.max_steps": request.steps,
        "trainer.learning_rate": request.learning_rate,
        "temperature": request.temperature,
        "checkpoint.every": 1 if request.keeps_weights else 0,
        "checkpoint.keep": 100,
        "loss.kl_coef": request.kl_coef,
        "logger": "wandb" if request.logs_to_wandb else "none",
        "gateway.port": "null" if request.gateway_port is None else request.gateway_port,
        "atropos.api_url": "null" if request.api_url is None else request.api_url,
        "atropos.launch": request.api_url is None,
        "atropos.timeout": request.outage_timeout,
        "atropos.data_timeout": request.data_timeout,
        "atropos.start_timeout": request.start_timeout,
        "atropos.take_over": request.take_over,
        "atropos.max_version_lag": "null" if request.max_version_lag is None else request.max_version_lag,
        "atropos.max_restarts": request.max_restarts,
        "env.num_processes": request.num_processes,
        "cluster.num_processes": request.num_ranks,
    }
    if (request.folder / "config.yaml").exists():
        overrides |= {"resume": request.folder}  # another number of steps or ranks is another configuration
    if request.environment:
        overrides |= {"env": "external", "env.command": f"[{','.join(request.environment)}]"}
    if request.multi_turn:
        overrides |= {"env": "multi_turn_calculator"}
    overrides |= {f"+env.arguments.{name}": value for name, value in request.environment_arguments.items()}
    words = [f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in overrides.items()]
    return [sys.executable, "-m", "atropos_exp.run", *SMALL, *words], {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }


def num_steps(folder: Path) -> int:
    return sum(row["step"] > 0 for row in _rows(folder))


def steps(folder: Path) -> list[Step]:
    found = []
    for row in _rows(folder):
        number = int(row["step"])
        if number == 0:
            continue
        journal = read_journal(folder / "rollouts" / f"step_{number:06d}.parquet")
        assert journal is not None and journal.step == number
        found.append(
            Step(
                step=number,
                groups=[_sequences(group) for group in journal.groups],
                losses={name: row[key] for name, key in LOSSES.items() if key in row},
                log=row,
            )
        )
    return found


def status(folder: Path) -> str:
    return str(json.loads((folder / "summary.json").read_text())["status"])


def num_from_atropos(folder: Path) -> int:
    return sum(bool(row.get("rollout/num_atropos")) for row in _rows(folder))


def is_program(name: str, words: list[str]) -> bool:
    """Whether a command line is that program: python -m MODULE …, where a guard's names a script first."""
    return words[1:2] == ["-m"] and words[2].startswith(PROGRAMS[name])


def error(folder: Path) -> str:
    return str(json.loads((folder / "summary.json").read_text())["error"])


def dropped(folder: Path) -> dict[str, int]:
    prefix = "atropos/groups_dropped_"
    rows = _rows(folder)
    return {
        key.removeprefix(prefix): int(rows[-1][key]) for key in (rows[-1] if rows else ()) if key.startswith(prefix)
    }


def dropped_rollouts(folder: Path) -> dict[str, int]:
    """Sum over steps, by reason."""
    prefix, totals = "rollout/dropped_", {}
    for row in _rows(folder):
        for key in row:
            if key.startswith(prefix):
                totals[key.removeprefix(prefix)] = totals.get(key.removeprefix(prefix), 0) + int(row[key])
    return totals


def weights(folder: Path, step: int) -> Path:
    if step == 1:
        return WEIGHTS
    from atropos_exp.export import export

    out = folder / "exported" / str(step)
    if not out.exists():
        export(folder / "checkpoints" / f"step_{step - 1:06d}", out, dtype="float32")
    return out


def _rows(folder: Path) -> list[Mapping[str, float]]:
    """Complete lines of metrics.jsonl, which is being written."""
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _sequences(group: RolloutGroup) -> list[TrainedSequence]:
    return [
        TrainedSequence(
            tokens=rollout.token_ids.tolist(),
            trained=rollout.trained.tolist(),
            logprobs=None if rollout.logprobs is None else rollout.logprobs.tolist(),
            advantages=None if rollout.advantages is None else rollout.advantages.tolist(),
            reward=rollout.reward,
            policy_version=rollout.policy_version,
            zero_advantage=rollout.zero_advantage,
            supervised=rollout.supervised,
            temperature=rollout.temperature,
            group_id=group.prompt_id,
            source=group.source,
        )
        for rollout in group.rollouts
    ]


def lost_batches(folder: Path) -> int:
    rows = _rows(folder)
    return int(rows[-1].get("atropos/lost_batches", 0)) if rows else 0


def saved(folder: Path, step: int) -> bool:
    """Whether a run can be resumed from `step`."""
    return (folder / "checkpoints" / f"step_{step:06d}" / "manifest.json").exists()
