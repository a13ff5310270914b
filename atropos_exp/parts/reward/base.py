"""The settings that all rewards share: how their processes are run."""

from __future__ import annotations

from dataclasses import dataclass

from atropos_exp.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PooledReward:
    """A reward that `RewardPool` runs. Subclasses add `__call__(answer, prompt) -> float`, and may add `warm_up()`,
    which imports what the first call would need, before any time limit runs."""

    num_workers: int
    timeout_seconds: float

    def __post_init__(self) -> None:
        if self.num_workers < 1:
            raise UserError(f"reward.num_workers is {self.num_workers}; expected at least 1 process")
        if not 0 < self.timeout_seconds < 3600:
            raise UserError(f"reward.timeout_seconds is {self.timeout_seconds}; expected seconds, more than 0")
