"""The settings that all rewards share: how their processes are run."""

from typing import Annotated

from pydantic import Field

from atropos_exp.config.settings import Few, Settings


class PooledReward(Settings):
    """A reward that `RewardPool` runs. Subclasses add `__call__(answer, prompt) -> float`, and override `warm_up` if
    they import libraries of their own."""

    num_workers: Few  # processes
    timeout_seconds: Annotated[float, Field(gt=0, lt=3600, description="seconds")]

    def warm_up(self) -> None:
        """Import what the first call needs, before any time limit runs."""
