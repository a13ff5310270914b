"""Rank 0 samples, every rank gets the same groups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from atropos_exp.types import Dropped, RolloutGroup

if TYPE_CHECKING:
    from atropos_exp.interfaces import JSON, RolloutSource
    from atropos_exp.ranks import Ranks


class RankZeroSource:
    """A `RolloutSource` for all ranks around the one of rank 0 (None elsewhere). Collective."""

    def __init__(self, inner: RolloutSource | None, ranks: Ranks) -> None:
        self._inner = inner
        self._ranks = ranks

    def take(self, num_groups: int, *, step: int) -> tuple[list[RolloutGroup], Dropped]:
        return self._ranks.on_zero(lambda: self._of_rank_zero().take(num_groups, step=step))

    def counters(self) -> Mapping[str, float]:
        return self._inner.counters() if self._inner is not None else {}

    def state(self) -> JSON:
        return self._inner.state() if self._inner is not None else {}

    def restore(self, state: JSON) -> None:
        self._ranks.on_zero(lambda: self._of_rank_zero().restore(state))

    def _of_rank_zero(self) -> RolloutSource:
        assert self._inner is not None, "rank 0 has the source"
        return self._inner
