"""The configuration: the facts that parts share."""

from typing import Annotated, Literal

from pydantic import Field

from atropos_exp.config.settings import Count, Seed, Settings

# Every group that becomes a part. `experiment` and `sweeps` only choose among these.
GROUPS = (
    *("model", "data", "reward", "rollout", "atropos", "env", "gateway", "engine"),
    *("advantage", "loss", "trainer", "cluster", "logger", "eval"),
)
Folder = Annotated[str, Field(min_length=1, description="a folder")]


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


class CheckpointConfig(Settings):
    every: Annotated[int, Field(ge=0, le=10**9, description="steps; 0: only the last")]
    keep: Count  # newest ones kept


class SyncConfig(Settings):
    bucket_mb: Annotated[int, Field(ge=1, le=65536, description="MiB")]
    canary_prompts: Annotated[int, Field(ge=1, le=10_000, description="every sync is proven")]
    tolerance: Annotated[float | None, Field(ge=0, le=1e6, description="nats; null: by the engine's dtype")]
    max_gap: Annotated[
        float | None, Field(gt=0, le=1e6, description="nats; null: by dtype and what the first steps showed")
    ]
    recheck: Literal["auto", True, False]


class RunConfig(Settings):
    """The root of the configuration less its groups; `conf/config.yaml` explains each key."""

    name: Annotated[
        str,
        Field(
            pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
            description="letters, digits, '.', '_' or '-' (it names a folder)",
        ),
    ]
    seed: Seed
    device: Literal["auto", "cpu", "cuda"]
    batch_size: Annotated[int, Field(ge=1, le=10**6)]  # prompts per step
    group_size: Annotated[int, Field(ge=1, le=10**5)]  # rollouts per prompt
    max_prompt_length: Count  # tokens
    max_response_length: Count  # tokens
    temperature: Annotated[float, Field(gt=0, le=10)]  # greedy rollouts of one prompt would all be equal
    top_p: Annotated[float, Field(gt=0, le=1, description="1: off")]
    top_k: Annotated[int, Field(ge=0, le=10**9, description="0: off")]
    output_dir: Folder
    run_dir: Folder | None
    resume: Annotated[str, Field(min_length=1, description="auto, never or a path")]
    checkpoint: CheckpointConfig
    sync: SyncConfig
