"""Settings of `sweep=grid` and `sweep=optuna`: which runs a sweep has, and how many of them run at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from atropos_exp.config.typed import Ranges, check_ranges

_SHARED: Ranges = {
    "dir": (lambda folder: folder != "", "a folder, or null"),
    "parallel": (lambda count: 1 <= count <= 256, "1 to 256"),
    "timeout_minutes": (lambda minutes: minutes is None or 0 < minutes < math.inf, "minutes above 0, or null"),
    "stop_grace_s": (lambda seconds: 0 <= seconds < math.inf, "seconds of 0 or more"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class GridSweep:
    """Settings of `sweep=grid`: every combination of values, each once per seed."""

    grid: dict[str, Any]  # key -> list of values
    zip: dict[str, Any]  # key -> list of values, all of one length
    seeds: list[int]
    baseline: dict[str, Any] | None
    dir: str | None
    parallel: int
    devices: list[str]
    timeout_minutes: float | None
    stop_grace_s: float
    wait: bool

    RANGES: ClassVar[Ranges] = {
        **_SHARED,
        "grid": (lambda grid: all(_is_list(values) for values in grid.values()), "a list of values for each key"),
        "zip": (
            lambda zipped: (
                all(_is_list(values) for values in zipped.values())
                and len({len(values) for values in zipped.values()}) <= 1
            ),
            "a list of values for each key, all of one length",
        ),
        "seeds": (lambda seeds: len(set(seeds)) == len(seeds), "seeds that differ"),
    }

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class OptunaSweep:
    """Settings of `sweep=optuna`: a search by TPE with successive halving."""

    space: dict[str, Any]  # key -> list of choices, or Hydra's words for an interval
    trials: int
    metric: str | None
    startup_trials: int
    prune: bool
    min_steps: int
    reduction_factor: int
    max_failed_trials: int
    sampler_seed: int
    dir: str | None
    parallel: int
    devices: list[str]
    timeout_minutes: float | None
    stop_grace_s: float
    wait: bool

    RANGES: ClassVar[Ranges] = {
        **_SHARED,
        "trials": (lambda count: count >= 1, "at least 1"),
        "startup_trials": (lambda count: count >= 1, "at least 1"),
        "min_steps": (lambda steps: steps >= 1, "at least 1"),
        "reduction_factor": (lambda factor: factor >= 2, "at least 2"),
        "max_failed_trials": (lambda count: count >= 0, "0 or more"),
        "sampler_seed": (lambda seed: 0 <= seed < 2**31, "0 to 2147483647"),
    }

    def __post_init__(self) -> None:
        check_ranges(self)


def _is_list(values: Any) -> bool:
    return isinstance(values, list) and len(values) >= 1
