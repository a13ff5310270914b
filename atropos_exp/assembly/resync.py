"""An engine that is lost in the middle of a run: started anew, synced again, and asked once more."""

import logging
from collections.abc import Callable, Mapping
from typing import TypeVar

from atropos_exp.errors import EngineError, EngineLost, WrongSampler
from atropos_exp.interfaces import JSON, Engine, Evaluator, Publisher, RolloutSource
from atropos_exp.parts.gateway.client import GatewayClient
from atropos_exp.processes.ranks import Ranks
from atropos_exp.types import Dropped, RolloutGroup, SyncStats

log = logging.getLogger(__name__)

Value = TypeVar("Value")


def of_rank_zero(part: Value | None) -> Value:
    """Return what rank 0 has and the other ranks have not."""
    assert part is not None, "rank 0 has it"
    return part


class Resync:
    """A `Publisher` around another one, and the way to an engine that may be lost. Collective: every rank makes the
    same calls; rank 0 alone has the engine.

    A new server serves what its folder holds, so it refuses to sample until `publish` has been repeated: nobody gets
    a token of other weights than those of the version. For the same reason the gate is shut from the start of a sync
    until it is proven, and stays shut if it is not.
    """

    def __init__(
        self,
        publisher: Publisher,
        engine: Engine | None,
        ranks: Ranks,
        *,
        max_restarts: int,
        gate: GatewayClient | None = None,
        condemn: Callable[[int], None] | None = None,
    ) -> None:
        """`gate`: what requests of environments go through; rank 0's, if there are environments. `condemn`: puts the
        rollouts of a step aside; rank 0's."""
        self._publisher = publisher
        self._engine = engine
        self.ranks = ranks
        self._max_restarts = max_restarts
        self._gate = gate
        self._condemn = condemn
        self._version: int | None = None  # published last
        self.num_restarts = 0
        self.num_repeated = 0  # proven syncs of a version that had been proven before, for a new server
        self._memory: dict[str, float] = {}

    @property
    def num_syncs(self) -> int:
        return self._publisher.num_syncs

    @property
    def num_verified(self) -> int:
        return self._publisher.num_verified

    def recheck(self, *, before: int) -> None:
        self.through(lambda: self._condemning(before, lambda: self._publisher.recheck(before=before)))

    def publish(self, version: int) -> SyncStats:
        self._version = None  # what was published before is no longer wanted: only this
        self._order(lambda gate: gate.hold())
        stats = self.through(lambda: self._condemning(version, lambda: self._publisher.publish(version)))
        self._version = version
        self._order(lambda gate: gate.release())
        return stats

    def sleep(self) -> None:
        """The engine gives its memory back until the next `publish`, and the gate is shut until then."""
        self._order(lambda gate: gate.hold())
        if self._version is not None:
            self.recheck(before=self._version + 1)  # asleep it holds nothing
        before, after = self.on_zero(lambda: of_rank_zero(self._engine).sleep())
        self._memory = {
            "engine/memory_awake_gb": before / 2**30,
            "engine/memory_asleep_gb": after / 2**30,
            "engine/memory_freed_gb": (before - after) / 2**30,
        }

    def counters(self) -> dict[str, float]:
        return {"engine/restarts": self.num_restarts, **self._memory}

    def _condemning(self, step: int, work: Callable[[], Value]) -> Value:
        """What `work` returns, which ends the step. If its rollouts turn out to be of other weights, they are put
        aside."""
        try:
            return work()
        except WrongSampler:
            if self._condemn is not None:
                self._condemn(step)
            raise

    def _order(self, order: Callable[[GatewayClient], None]) -> None:
        """A gateway that is down is no reason to stop: nobody gets tokens from it."""
        if self._gate is not None:
            try:
                order(self._gate)
            except EngineError as error:
                log.warning("the gateway did not take an order: %s", error)

    def on_zero(self, work: Callable[[], Value], *, undo: Callable[[], None] = lambda: None) -> Value:
        """`through`, for `work` of rank 0 alone, whose result every rank gets."""
        return self.through(lambda: self.ranks.on_zero(work), undo=undo)

    def through(self, work: Callable[[], Value], *, undo: Callable[[], None] = lambda: None) -> Value:
        """What `work` returns. If the engine is lost in it, `undo` comes before the repetition. `work` must fail on
        every rank if it fails on one."""
        while True:
            try:
                return work()
            except Exception as error:  # raised again unless rank 0 lost its engine
                if not self.ranks.any(isinstance(error, EngineLost)):
                    raise
                self._restart(error)
            if self._version is not None:
                self.publish(self._version)
                self.num_repeated += 1
            undo()

    def _restart(self, error: Exception) -> None:
        if self.num_restarts >= self._max_restarts:
            error.add_note(f"the engine was started anew {self.num_restarts} times (engine.max_restarts)")
            raise error
        self.num_restarts += 1
        if self.ranks.is_zero:
            log.warning("engine lost, restart %d of %d: %s", self.num_restarts, self._max_restarts, error)
        self.ranks.on_zero(self._restart_engine)

    def _restart_engine(self) -> None:
        try:
            of_rank_zero(self._engine).restart()
        except EngineLost as error:  # a fresh server that is lost at once would be lost again
            raise EngineError(f"the engine was lost, and its new server too: {error}") from error


class ResyncedSource:
    """A `RolloutSource` for all ranks around the one of rank 0 (None elsewhere): every rank gets the same groups, and a
    step is sampled again if the engine is lost in it. Collective."""

    def __init__(self, inner: RolloutSource | None, resync: Resync) -> None:
        self._inner = inner
        self._resync = resync

    def take(self, num_groups: int, *, step: int) -> tuple[list[RolloutGroup], Dropped]:
        state = self.state()
        return self._resync.on_zero(
            lambda: of_rank_zero(self._inner).take(num_groups, step=step), undo=lambda: self.restore(state)
        )

    def counters(self) -> Mapping[str, float]:
        own = self._inner.counters() if self._inner is not None else {}
        return {**own, **self._resync.counters()}

    def state(self) -> JSON:
        return self._inner.state() if self._inner is not None else {}

    def restore(self, state: JSON) -> None:
        self._resync.ranks.on_zero(lambda: of_rank_zero(self._inner).restore(state))


class ResyncedEvaluator:
    """An `Evaluator` that asks again if the engine is lost. Every rank gets the metrics of rank 0's `inner`."""

    def __init__(self, inner: Evaluator | None, resync: Resync) -> None:
        self._inner = inner
        self._resync = resync

    def __call__(self, policy_version: int) -> dict[str, float]:
        return self._resync.on_zero(lambda: of_rank_zero(self._inner)(policy_version))
