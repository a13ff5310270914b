"""summary.json: what a run came to, read from its metrics.jsonl, so that the two cannot disagree."""

from collections.abc import Mapping, Sequence
from typing import Any

from atropos_exp.runs.files import Row


def summarize_run(
    rows: Sequence[Row],
    *,
    status: str,
    error: str | None,
    policy_version: int,
    resumed_from: str | None,
    seed: int,
    git: str | None,
    versions: Mapping[str, str],
    config_hash: str,
    dropped_waiting: Mapping[str, int] | None = None,
    num_failed_syncs: int = 0,
    num_repeated_syncs: int = 0,
) -> dict[str, Any]:
    """The summary of a run whose metrics.jsonl holds `rows`.

    A sync whose proof failed has no row, nor has one that was repeated because the engine had been restarted; the last
    two arguments count them. `dropped_waiting` are rollouts of a step that has none, by reason.
    """
    assert status in ("finished", "stopped", "failed"), status
    rewards = _column(rows, "reward/mean")
    accuracies = [value for row in rows if (value := eval_accuracy(row)) is not None]
    step_seconds = sum(_column(rows, "time/step_s"))
    syncs = [row for row in rows if row.get("sync/bytes") is not None]
    sync_seconds, gaps = _column(syncs, "time/sync_s"), _column(syncs, "sync/canary_gap_max")
    return {
        "status": status,
        "error": error,  # one line, None unless failed
        "steps": len({row.step for row in rows} - {0}),  # step 0 is the untrained policy
        "policy_version": policy_version,  # of the last weights
        "reward_first": rewards[0] if rewards else None,
        "reward_last": rewards[-1] if rewards else None,
        "eval_first": accuracies[0] if accuracies else None,  # greedy, mean over the held-out sets
        "eval_last": accuracies[-1] if accuracies else None,
        "wall_seconds": step_seconds,  # over all attempts; what came before the first step is left out
        "tokens_per_second": sum(_column(rows, "rollout/num_tokens")) / step_seconds if step_seconds else None,
        "rollouts": {
            "atropos": int(sum(_column(rows, "rollout/num_atropos"))),
            "local": int(sum(_column(rows, "rollout/num_local"))),
            "dropped": _dropped(rows, dropped_waiting or {}),
        },
        "sync": {
            "count": len(syncs) + num_failed_syncs + num_repeated_syncs,
            "verified": len(syncs) + num_repeated_syncs,
            "seconds_mean": sum(sync_seconds) / len(sync_seconds) if sync_seconds else None,
            "bytes": int(syncs[-1]["sync/bytes"] or 0) if syncs else 0,  # of one sync
            "canary_gap_max": max(gaps) if gaps else None,
        },
        "resumed_from": resumed_from,  # the checkpoint's folder name, None for a new run
        "seed": seed,
        "git": git,
        "versions": dict(versions),
        "config_hash": config_hash,
    }


def eval_accuracy(row: Mapping[str, float | None]) -> float | None:
    """Greedy accuracy of a step, the plain mean over its held-out sets; None if it had no evaluation."""
    values = [
        value
        for name, value in row.items()
        if name.startswith("eval/") and name.endswith("/accuracy") and value is not None
    ]
    return sum(values) / len(values) if values else None


def _column(rows: Sequence[Row], name: str) -> list[float]:
    return [value for row in rows if (value := row.get(name)) is not None]


def _dropped(rows: Sequence[Row], waiting: Mapping[str, int]) -> dict[str, int]:
    prefix = "rollout/dropped_"
    total = dict(waiting)
    for row in rows:
        for name, value in row.items():
            if name.startswith(prefix) and value:
                total[name.removeprefix(prefix)] = total.get(name.removeprefix(prefix), 0) + int(value)
    return total
