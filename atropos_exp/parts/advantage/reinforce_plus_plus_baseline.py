"""REINFORCE++ with a baseline (arXiv:2501.03262): reward minus the group's mean, whitened over the batch's tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from atropos_exp.parts.advantage.base import ComparedRollouts, VerlAdvantage, is_constant, whiten
from atropos_exp.types import Floats


@dataclass(frozen=True, kw_only=True)
class ReinforcePlusPlusBaseline(VerlAdvantage):
    """verl's `compute_reinforce_plus_plus_baseline_outcome_advantage`.

    Whitening takes the trained tokens of the rollouts that get an advantage, and no others.
    """

    verl_name: ClassVar[str] = "reinforce_plus_plus_baseline"

    def estimate(self, rows: ComparedRollouts) -> Floats:
        group_N = rows.index_N.astype(np.int64)
        means = np.bincount(group_N, rows.rewards_N) / np.bincount(group_N)
        if is_constant((rows.rewards_N - means[group_N])[rows.counts_N], among=rows.rewards_N):
            return np.zeros_like(rows.rewards_N)
        # verl whitens over a mask [N, R]; one column per row, then the same whitening weighted by length, gives
        # the same numbers, for whitening undoes any shift and scale before it, without memory for every token
        return whiten(self.call_verl(rows, mask=rows.counts_N[:, None])[:, 0], rows)
