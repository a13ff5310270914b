"""Holds requests while weights change: they wait, then go on. Only after `max_hold_seconds` are they refused."""

import asyncio
import time

from atropos_exp.parts.gateway.counters import Counters
from atropos_exp.parts.gateway.refusal import Refusal


class Gate:
    """A gate that is open or closed, for the requests of one event loop. `held`: whether it starts closed."""

    def __init__(self, counters: Counters, *, max_hold_seconds: float, held: bool) -> None:
        self._counters = counters
        self._max_hold_seconds = max_hold_seconds
        self._opened = asyncio.Event()
        self._opened.set()
        self._closed_at: float | None = None
        if held:
            self.hold()

    @property
    def is_holding(self) -> bool:
        """Whether the gate is closed."""
        return self._closed_at is not None

    @property
    def held_seconds(self) -> float:
        """How long the gate has been closed; 0 while it is open."""
        return 0.0 if self._closed_at is None else time.monotonic() - self._closed_at

    def hold(self) -> None:
        """Close the gate. Does nothing if it is closed."""
        if self._closed_at is None:
            self._closed_at = time.monotonic()
            self._opened.clear()

    def release(self) -> None:
        """Open the gate. Does nothing if it is open."""
        if self._closed_at is not None:
            self._counters.add("held_seconds", self.held_seconds)
            self._closed_at = None
            self._opened.set()

    async def enter(self) -> None:
        """Wait until the gate is open. Raises Refusal (503) after `max_hold_seconds`."""
        if self._closed_at is None:
            return
        self._counters.add("held_requests")
        try:
            async with asyncio.timeout(self._max_hold_seconds):
                while self._closed_at is not None:  # it may have closed again before this request ran
                    await self._opened.wait()
        except TimeoutError:
            raise Refusal(
                503,
                "hold",
                f"held for {self._max_hold_seconds:g} s (gateway.max_hold_seconds) while the trainer changes weights",
                retry_seconds=5,
            ) from None
