"""`rollout=atropos`: every group comes from an Atropos API; without one the run ends and says why."""

from typing import ClassVar

from atropos_exp.config.settings import Settings
from atropos_exp.interfaces import RemoteSource, RolloutSource


class AtroposRollout(Settings):
    """Settings of `rollout=atropos`."""

    mask_truncated: bool  # read by this project's own environments

    uses_atropos: ClassVar[bool] = True
    falls_back: ClassVar[bool] = False

    def choose(self, *, local: RolloutSource, remote: RemoteSource | None) -> RolloutSource:
        """The source to train from: Atropos."""
        assert remote is not None
        return remote
