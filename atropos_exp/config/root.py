"""The configuration: facts that parts share, and `build`, which turns one YAML node into a checked frozen object."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import ClassVar

from atropos_exp.config.typed import Ranges, check_ranges

# Every group that becomes a part. `experiment` and `sweeps` only choose among these.
GROUPS = (
    *("model", "data", "reward", "rollout", "atropos", "env", "gateway", "engine"),
    *("advantage", "loss", "trainer", "cluster", "logger", "eval"),
)


# Keys of earlier versions and of the papers' scripts -> what to type instead.
OLD_KEYS = {
    "use_gpro": "advantage=grpo",
    "use_grpo": "advantage=grpo",
    "gpro_epsilon": "advantage.epsilon",
    "grpo_epsilon": "advantage.epsilon",
    "gpro_norm_by_std": "advantage.norm_by_std",
    "grpo_norm_by_std": "advantage.norm_by_std",
    "advantage_normalization": "advantage.normalization (none or batch)",
    "advantage_clipping": "advantage.clip ([low, high] or null)",
    "use_advantage_weighting": "loss=advantage_weighted_sft",
    "model_path": "model.path",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    every: int  # steps; 0: only the last
    keep: int  # newest ones kept

    RANGES: ClassVar[Ranges] = {
        "every": (lambda steps: steps >= 0, "0 (only the last) or more"),
        "keep": (lambda count: count >= 1, "at least 1"),
    }

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncConfig:
    bucket_mb: int  # MiB
    canary_prompts: int
    tolerance: float | None  # nats; None: by the engine's dtype

    RANGES: ClassVar[Ranges] = {
        "bucket_mb": (lambda size: 1 <= size <= 65536, "1 to 65536 MiB"),
        "canary_prompts": (lambda count: count >= 1, "at least 1: every sync is proven"),
        "tolerance": (lambda gap: gap is None or 0 <= gap < math.inf, "nats of 0 or more, or null (by dtype)"),
    }

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """The root of the configuration less its groups; `conf/config.yaml` explains each key."""

    name: str
    seed: int
    device: str  # auto | cpu | cuda
    batch_size: int  # prompts per step
    group_size: int  # rollouts per prompt
    max_prompt_length: int  # tokens
    max_response_length: int  # tokens
    temperature: float
    top_p: float
    top_k: int
    output_dir: str
    run_dir: str | None
    resume: str  # auto | never | path
    checkpoint: CheckpointConfig
    sync: SyncConfig

    RANGES: ClassVar[Ranges] = {
        "name": (
            lambda name: re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) is not None,
            "letters, digits, '.', '_' or '-' (it names a folder)",
        ),
        "seed": (lambda seed: 0 <= seed < 2**31, "0 to 2147483647"),
        "device": (lambda device: device in ("auto", "cpu", "cuda"), "auto, cpu or cuda"),
        "batch_size": (lambda count: count >= 1, "at least 1"),
        "group_size": (lambda count: count >= 1, "at least 1"),
        "max_prompt_length": (lambda length: length >= 1, "at least 1"),
        "max_response_length": (lambda length: length >= 1, "at least 1"),
        # greedy rollouts of one prompt would all be equal; comparisons are false for NaN
        "temperature": (lambda value: 0 < value <= 10, "above 0 and at most 10"),
        "top_p": (lambda share: 0 < share <= 1, "above 0 and at most 1 (1 = off)"),
        "top_k": (lambda count: count >= 0, "0 (off) or more"),
        "output_dir": (lambda folder: folder != "", "a folder"),
        "run_dir": (lambda folder: folder != "", "a folder, or null"),
        "resume": (lambda how: how != "", "auto, never or a path"),
    }

    def __post_init__(self) -> None:
        check_ranges(self)
