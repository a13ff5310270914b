"""This project as the suite sees it. Everything that knows its command line and its files is here."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from contract import HERE, Request, TrainedSequence, Step

from atropos_exp.journal import read_journal
from atropos_exp.model.tiny import WEIGHTS
from atropos_exp.types import RolloutGroup

ROOT = HERE.parents[1]
EXIT_CODE_REFUSED = 2
VOCABULARY = 384
PROGRAMS = {
    "api": "atroposlib.cli.run_api",
    "environment": "atropos_exp.atropos.envs.",
    "gateway": "atropos_exp.gateway.server",
    "engine": "atropos_exp.engine.hf_server",
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


def command(request: Request) -> tuple[list[str], dict[str, str]]:
    overrides = {
        "output_dir": request.folder.parent,
        "run_dir": request.folder,
        "rollout": "auto" if request.falls_back else "atropos",
        "trainer.max_steps": request.steps,
        "trainer.learning_rate": request.learning_rate,
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
    if request.environment:
        overrides |= {"env": "external", "env.command": f"[{','.join(request.environment)}]"}
    if request.multi_turn:
        overrides |= {"env": "multi_turn_calculator"}
    overrides |= {f"+env.arguments.{name}": value for name, value in request.environment_arguments.items()}
    words = [f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in overrides.items()]
    return [sys.executable, "-m", "atropos_exp.run", *SMALL, *words], {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


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


def dropped(folder: Path) -> dict[str, int]:
    prefix = "atropos/groups_dropped_"
    rows = _rows(folder)
    return {key.removeprefix(prefix): int(rows[-1][key]) for key in (rows[-1] if rows else ()) if key.startswith(prefix)}


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


CAUSES = {
    "nobody has registered": "no environment has registered",
    "a silent environment": "environments have registered and send nothing",
    "a minimum allocation": "minimum allocation",
    "sizes that do not divide": "sizes divide the largest",
    "sequences that are too long": "drops its groups because a sequence has 137 tokens or more",
    "an environment that does not start": r"environment external ended with exit code 3, 2 times in a row",
}
REASONS = {
    "a mask shorter than its tokens": "lengths",
    "4 sequences, 1 mask, 1 score": "lengths",
    "a mask value that is not the token": "mask_value",
    "masks of true and false": "mask_value",
    "a token id beyond the vocabulary": "token_id",
    "a negative token id": "token_id",
    "nothing trained": "no_trained_token",
    "dummy tokens 0..127": "dummy_tokens",
    "a token too many": "too_long",
    "images": "multimodal",
    "distillation": "distillation",
    "logprobs of another length": "lengths",
    "advantages of another length": "lengths",
    "an absurd score": "non_finite",
    "an impossible temperature": "temperature",
    "doubled": "doubled",
}


def saved(folder: Path, step: int) -> bool:
    """Whether a run can be resumed from `step`."""
    return (folder / "checkpoints" / f"step_{step:06d}" / "manifest.json").exists()


def wandb_place(folder: Path) -> tuple[str, str]:
    """Project and group that the trainer itself logged to, from the record that W&B keeps of a run offline."""
    import re

    (record,) = folder.rglob("*.wandb")
    raw = record.read_bytes()
    group = "/".join(folder.parts[-3:])
    assert group.encode() in raw, f"{record} does not name the group {group}"
    assert re.search(rb"atropos-exp", raw)
    return "atropos-exp", group
