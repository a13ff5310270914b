"""The settings that all rewards share: how their processes are run."""

from typing import Annotated

from pydantic import Field

from atropos_exp.config.settings import Count, Settings


class PooledReward(Settings):
    """A reward that `RewardPool` runs. Subclasses add `__call__(answer, prompt) -> float`, and may add `warm_up()`,
    which imports what the first call would need, before any time limit runs."""

    num_workers: Count  # processes
    timeout_seconds: Annotated[float, Field(gt=0, lt=3600, description="seconds")]
