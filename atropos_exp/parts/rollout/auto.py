"""`rollout=auto`: rollouts from Atropos while it delivers, local ones while it does not."""

import logging
from collections import Counter
from collections.abc import Mapping
from typing import ClassVar

from atropos_exp.config.settings import Settings
from atropos_exp.errors import SourceUnavailable
from atropos_exp.interfaces import JSON, RemoteSource, RolloutSource
from atropos_exp.types import Dropped, RolloutGroup

log = logging.getLogger(__name__)


class AutoRollout(Settings):
    """Settings of `rollout=auto`."""

    mask_truncated: bool  # a completion cut by the token limit counts in its baseline but is not trained on

    uses_atropos: ClassVar[bool] = True
    falls_back: ClassVar[bool] = True

    def choose(self, *, local: RolloutSource, remote: RemoteSource | None) -> RolloutSource:
        """The source to train from: Atropos, with local rollouts in reserve."""
        assert remote is not None
        return AutoSource(remote, local)


class AutoSource:
    """A `RolloutSource` that uses one of two for each step; a step never mixes them."""

    def __init__(self, remote: RemoteSource, local: RolloutSource) -> None:
        self._remote = remote
        self._local = local
        self._is_remote = True
        self._counters: Counter[str] = Counter()

    def take(self, num_groups: int, *, step: int) -> tuple[list[RolloutGroup], Dropped]:
        """Groups from Atropos if it delivered the last step (then waiting for it) or has some now; else local ones."""
        if self._is_remote or self._remote.is_ready(step=step):
            try:
                taken = self._remote.take(num_groups, step=step)
            except SourceUnavailable as reason:
                self._switch(to_remote=False, step=step, reason=str(reason))
            else:
                self._switch(to_remote=True, step=step)
                return taken
        self._counters["local_steps"] += 1
        return self._local.take(num_groups, step=step)

    def counters(self) -> Mapping[str, float]:
        own = {f"atropos/{name}": float(value) for name, value in self._counters.items()}
        return {**self._remote.counters(), **self._local.counters(), **own}

    def state(self) -> JSON:
        return {"local": self._local.state(), "remote": self._remote.state()}

    def restore(self, state: JSON) -> None:
        self._local.restore(state["local"])
        self._remote.restore(state["remote"])

    def _switch(self, *, to_remote: bool, step: int, reason: str = "") -> None:
        if to_remote == self._is_remote:
            return
        self._is_remote = to_remote
        self._counters["switches"] += 1
        if to_remote:
            log.warning("step %d: Atropos delivers again; its rollouts are trained on from here", step)
        else:
            log.warning(
                "step %d: no rollouts from Atropos (%s); going on with local ones until it is back", step, reason
            )
