"""OPO (arXiv:2505.23585): reward minus the group's length-weighted mean, the baseline of least variance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from atropos_exp.parts.advantage.base import ComparedRollouts, VerlAdvantage
from atropos_exp.types import Floats


@dataclass(frozen=True, kw_only=True)
class OPO(VerlAdvantage):
    """verl's `compute_opo_outcome_advantage`; the length of a rollout is its number of trained tokens."""

    verl_name: ClassVar[str] = "opo"

    def estimate(self, rows: ComparedRollouts) -> Floats:
        # verl takes the length as the sum of the mask's row and multiplies the result by the mask:
        # one column that holds the length stands for a whole row of ones
        lengths_N1 = rows.lengths_N[:, None]
        return (self.call_verl(rows, mask=lengths_N1) / lengths_N1)[:, 0].astype("float32")
