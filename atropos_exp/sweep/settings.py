"""Settings of `sweep=grid` and `sweep=optuna`: which runs a sweep has, and how many of them run at once."""

from typing import Annotated, Any

from pydantic import AfterValidator, Field

from atropos_exp.config.settings import Count, Index, Seed, Settings
from atropos_exp.errors import UserError


def _lists(values: dict[str, Any]) -> dict[str, Any]:
    if not all(isinstance(items, list) and items for items in values.values()):
        raise UserError(f"got {values}, expected a list of values for each key")
    return values


def _equally_long(values: dict[str, Any]) -> dict[str, Any]:
    if len({len(items) for items in values.values()}) > 1:
        raise UserError(f"got {values}, expected a list of values for each key, all of one length")
    return values


def _distinct(seeds: list[int]) -> list[int]:
    if len(set(seeds)) != len(seeds):
        raise UserError(f"got {seeds}, expected seeds that differ")
    return seeds


class SweepSettings(Settings):
    """What every sweep has: where it is stored, and how its runs are executed."""

    dir: Annotated[str | None, Field(min_length=1, description="a folder, or null")]
    parallel: Annotated[int, Field(ge=1, le=256)]
    devices: list[str]
    timeout_minutes: Annotated[float | None, Field(gt=0, le=1e7, description="minutes")]
    stop_grace_s: Annotated[float, Field(ge=0, le=1e6, description="seconds")]
    wait: bool


class GridSweep(SweepSettings):
    """Settings of `sweep=grid`: every combination of values, each once per seed."""

    grid: Annotated[dict[str, Any], AfterValidator(_lists)]
    zip: Annotated[dict[str, Any], AfterValidator(_lists), AfterValidator(_equally_long)]
    seeds: Annotated[list[Seed], AfterValidator(_distinct)]
    baseline: dict[str, Any] | None


class OptunaSweep(SweepSettings):
    """Settings of `sweep=optuna`: a search by TPE with successive halving."""

    space: dict[str, Any]  # key -> list of choices, or Hydra's words for an interval
    trials: Count
    metric: str | None
    startup_trials: Count
    prune: bool
    min_steps: Count
    reduction_factor: Annotated[int, Field(ge=2, le=1000)]
    max_failed_trials: Index
    sampler_seed: Seed
