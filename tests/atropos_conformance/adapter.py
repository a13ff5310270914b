"""This project as the suite sees it. Everything that knows its command line and its files is here."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from atropos_exp.parts.model.tiny import WEIGHTS
from atropos_exp.runs.journal import read_journal
from atropos_exp.types import RolloutGroup
from tests.atropos_conformance.contract import HERE, Request, Step, TrainedSequence

ROOT = HERE.parents[1]
EXIT_CODE_REFUSED = 2
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


ASSISTANT, END = 4, 1  # of the chat template of the model `tiny`
TOKEN_ADVANTAGES = {"token_advantages": True}  # of the multi-turn environment
CAUSES = {
    "nobody has registered": "no environment has registered",
    "a silent environment": "environments have registered and send nothing",
    "a minimum allocation": "minimum allocation .* Nothing is queued of environment 1",
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
    "too old": "stale",
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


HOW = {
    "test_foreign_run_is_refused": "exit code 2; `atropos.take_over` named as the way",
    "test_foreign_run_is_taken_over_when_told_to": "`atropos.take_over=true`",
    "test_waiting_trainer_neither_hammers_nor_sleeps": "0.05 s to 1 s, jittered",
    "test_slow_batch_is_waited_for": "`atropos.batch_timeout`, at least 120 s",
    "test_silent_read_is_given_up_and_counted": "`atropos/lost_batches`",
    "test_each_update_trains_one_batch_once": "all formed batches are fetched at once and sorted; one is trained",
    "test_behaviour_logprobs_make_truncated_importance_weights": "`trainer.importance_cap`",
    "test_missing_logprobs_and_the_sentinel_are_no_logprobs": "weight 1; the ledger's where the gateway sampled them",
    "test_counters_match_exactly_what_was_sent": "`atropos/groups_dropped_<reason>`",
    "test_numbers_that_are_not_finite_cost_one_batch_and_no_step": "`atropos/lost_batches`",
    "test_stated_version_is_the_one_that_sampled": "the gateway's ledger knows it",
    "test_too_old_a_group_is_dropped": "`atropos.max_version_lag`, counted as `stale`",
    "test_other_logprobs_than_the_sampler_gave_are_corrected": "`atropos/logprobs_corrected`",
    "test_silent_api_does_not_stop_a_run_that_may_fall_back": "`rollout=auto`, `atropos.data_timeout`",
    "test_run_goes_on_alone_without_an_api": "`rollout=auto`, `atropos.timeout`",
    "test_stall_is_explained_in_time": "`atropos.data_timeout`",
    "test_environment_that_does_not_start_is_given_up_with_its_last_words": "`atropos.max_restarts`",
}


def expect_lost_batch(url: str, *, seconds: float) -> None:
    """Ask once for a batch with this deadline; fails unless the client says that it is lost."""
    import pytest

    from atropos_exp.parts.atropos.client import AtroposClient, BatchLost

    client = AtroposClient(url, batch_seconds=seconds)
    try:
        with pytest.raises(BatchLost):
            client.batch()
    finally:
        client.close()
