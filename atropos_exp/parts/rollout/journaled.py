"""A rollout source that writes every step to disk before it is trained on, and replays it after a crash."""

from collections.abc import Mapping
from pathlib import Path

from atropos_exp.interfaces import JSON, RolloutSource
from atropos_exp.runs.journal import Journal, read_journal, write_journal
from atropos_exp.types import Dropped, RolloutGroup


class JournaledSource:
    """A `RolloutSource` around `inner`; the journals lie in `folder`, one Parquet file a step."""

    def __init__(self, inner: RolloutSource, folder: Path) -> None:
        self._inner = inner
        self._folder = folder

    def take(self, num_groups: int, *, step: int) -> tuple[list[RolloutGroup], Dropped]:
        """The groups of `step` from its journal if an interrupted process wrote one, else new ones."""
        path = self._path(step)
        journal = read_journal(path)
        if journal is not None:
            self._inner.restore(dict(journal.state))
            return journal.groups, journal.dropped
        groups, dropped = self._inner.take(num_groups, step=step)
        write_journal(path, Journal(step=step, groups=groups, dropped=dropped, state=self._inner.state()))
        return groups, dropped

    def condemn(self, step: int) -> None:
        """Put the journal of a step aside whose rollouts are worth nothing: who continues samples that step again."""
        path = self._path(step)
        if path.exists():
            path.rename(path.with_suffix(".condemned.parquet"))

    def _path(self, step: int) -> Path:
        return self._folder / f"step_{step:06d}.parquet"

    def counters(self) -> Mapping[str, float]:
        return self._inner.counters()

    def state(self) -> JSON:
        return self._inner.state()

    def restore(self, state: JSON) -> None:
        self._inner.restore(state)
