"""Whether the engine still holds what the last sync proved: asked before its weights change again."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Literal

from atropos_exp.errors import WrongSampler
from atropos_exp.interfaces import Engine
from atropos_exp.weights.tensors import some

Mode = Literal["auto", True, False]
MAX_SHARE = 0.01  # of the time between two syncs that it may take, with `auto`


class Recheck:
    """Rank 0's. What was sampled between a sync and the next one came from the weights in between, so a tensor that
    changed there condemns the rollouts.

        recheck = Recheck(engine, mode="auto")
        recheck.note(held, seconds=0.01)  # the digests that agreed with what was sent
        recheck.begin(7)  # the whole proof has passed
        recheck.check(before=8)  # WrongSampler names what has changed since
    """

    def __init__(self, engine: Engine, *, mode: Mode) -> None:
        self._engine = engine
        self._mode = mode
        self._version = 0
        self._held: Mapping[str, str] = {}
        self._proven: Mapping[str, str] = {}
        self._since = 0.0
        self._seconds = 0.0  # that digests last took

    def note(self, held: Mapping[str, str], *, seconds: float) -> None:
        """The digests of what every server holds, which took so long; empty if the engine cannot tell."""
        self._held, self._seconds = held, seconds

    def begin(self, version: int) -> None:
        """What was noted is proven, and sampled from as `version`."""
        self._version, self._proven = version, self._held
        self._since = time.monotonic()

    def check(self, *, before: int) -> None:
        """Compare once, if it is wanted, before the sync to that version. The same version again is for a server that
        was started anew, which does not hold it yet. Raises WrongSampler, and EngineError if the engine fails."""
        proven, self._proven = self._proven, {}
        if not proven or before <= self._version or not self._is_wanted():
            return
        for number, server in enumerate(self._engine.replicas):
            now = server.digests()
            changed = [name for name, value in proven.items() if now.get(name) != value]
            if changed:
                which = f"server {number} of the engine" if len(self._engine.replicas) > 1 else "the engine"
                raise WrongSampler(
                    f"step {self._version + 1}: {which} no longer holds the weights of version {self._version} that it "
                    f"was proven to hold: {some(changed)} changed after the proof ({len(changed)} of {len(proven)} "
                    "tensors). Its rollouts since then came from other weights: the step is not saved and its rollouts "
                    "are put aside; the same command samples it again. Look for what else writes to the engine's "
                    "memory, and into log/engine.log"
                )

    def _is_wanted(self) -> bool:
        if self._mode == "auto":
            return self._seconds <= MAX_SHARE * (time.monotonic() - self._since)
        return self._mode
