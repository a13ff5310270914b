"""An engine whose weight updates hold the gateway: no environment gets a token while weights change."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from atropos_exp.types import Endpoint, Floats, Sample, SamplingParams, TokenIds
from atropos_exp.wire import EngineError

if TYPE_CHECKING:
    from atropos_exp.interfaces import Engine, WeightReceiver

log = logging.getLogger(__name__)


class Gate(Protocol):
    """What requests of environments go through."""

    def hold(self) -> None: ...

    def release(self) -> None: ...


class HeldEngine:
    """An `Engine` around another one. After an update that failed the gate stays shut, as the engine refuses anyway."""

    def __init__(self, engine: Engine, gate: Gate) -> None:
        self._engine = engine
        self._gate = gate

    @property
    def dtype(self) -> str:
        return self._engine.dtype

    @property
    def transfers_on_device(self) -> bool:
        return self._engine.transfers_on_device

    @property
    def replicas(self) -> Sequence[Engine]:
        return self._engine.replicas

    @property
    def endpoint(self) -> Endpoint:
        return self._engine.endpoint

    def generate(self, prompts: Sequence[TokenIds], params: SamplingParams, *, num_samples: int) -> list[list[Sample]]:
        return self._engine.generate(prompts, params, num_samples=num_samples)

    def score(self, sequences: Sequence[TokenIds], *, temperature: float) -> list[Floats]:
        return self._engine.score(sequences, temperature=temperature)

    def version(self) -> int:
        return self._engine.version()

    def libraries(self) -> Mapping[str, str]:
        return self._engine.libraries()

    def check(self) -> None:
        self._engine.check()

    def sleep(self) -> tuple[int, int]:
        """The gate stays shut until the update that wakes the engine."""
        self._try(self._gate.hold)
        return self._engine.sleep()

    @contextlib.contextmanager
    def updating(self, version: int) -> Iterator[WeightReceiver]:
        """See `Engine.updating`. A gateway that is down is no reason to stop: nobody gets tokens from it."""
        self._try(self._gate.hold)
        with self._engine.updating(version) as receiver:
            yield receiver
        self._try(self._gate.release)

    def restart(self) -> None:
        self._engine.restart()

    def stop(self) -> None:
        self._engine.stop()

    def _try(self, order: Callable[[], None]) -> None:
        try:
            order()
        except EngineError as error:
            log.warning("the gateway did not take an order: %s", error)
