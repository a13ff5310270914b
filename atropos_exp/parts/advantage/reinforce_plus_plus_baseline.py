"""REINFORCE++ with a baseline (Hu et al. 2025, arXiv:2501.03262): centred per group, normalised over the batch.

Every trained token t of rollout i gets the centred reward, whitened over all such tokens of the batch:

    d_t = r_i - mean(r of its group),    A_t = (d_t - mean_t(d)) / sqrt(var_t(d) + 1e-8)

mean_t and var_t (unbiased) run over tokens, so a rollout counts once per trained token.
"""

from typing import ClassVar

import numpy as np

from atropos_exp.parts.advantage.base import ComparedRollouts, VerlAdvantage, is_constant, whiten
from atropos_exp.types import Floats


class ReinforcePlusPlusBaseline(VerlAdvantage):
    """The advantages of verl's `compute_reinforce_plus_plus_baseline_outcome_advantage`.

    The batch's mean and variance are those of the rollouts that get an advantage.
    """

    verl_name: ClassVar[str] = "reinforce_plus_plus_baseline"

    def estimate(self, rows: ComparedRollouts) -> Floats:
        group_N = rows.index_N.astype(np.int64)
        means = np.bincount(group_N, rows.rewards_N) / np.bincount(group_N)
        centred_N = (rows.rewards_N - means[group_N]).astype(np.float32)
        if is_constant(centred_N[rows.counts_N], among=rows.rewards_N):
            return np.zeros_like(rows.rewards_N)
        # verl whitens over a mask [N, R]; one column per row, then the same whitening weighted by length, gives
        # the same numbers, for whitening undoes any shift and scale before it, without memory for every token
        return whiten(self.call_verl(rows, mask=rows.counts_N[:, None])[:, 0], rows)
