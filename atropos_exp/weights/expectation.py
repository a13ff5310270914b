"""What a server's canary may show: learned from the first proven syncs, and held against how the trainer's moves."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from atropos_exp.errors import SyncError
from atropos_exp.types import Floats

# Mean |engine - trainer| logprob of the canary's tokens, in nats, that rounding explains with any model, by the dtype
# of the served weights. SmolLM2-135M in bfloat16 at temperature 0.7 was seen at 0.09 to 0.18, plain transformers
# against itself in float32 at 0.07, single tokens up to 1.5 (docs/results/smollm2.md).
CEILING = {"float32": 2e-4, "float16": 0.05, "bfloat16": 0.5}
FLOOR = {"float32": 2e-4, "float16": 5e-3, "bfloat16": 0.08}  # not judged below, however exact the first syncs were
NUM_FIRST = 5  # proven syncs that show what is usual for this model, engine, dtype and temperature
WINDOW = 32  # proven syncs that it is made of later: it changes slowly as the policy learns
MARGIN = 4.0  # times the largest of them
ONE_TOKEN = 10.0  # by how much one token may exceed what is allowed in the mean
# The engine's logprobs must move by at least this share of what the trainer's move, once these have moved so far that
# rounding cannot hide it: so many standard errors.
FOLLOWS = 0.5
CERTAIN = 8.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Allowed:
    """By how much an engine's canary may differ from the trainer's, in nats."""

    mean: float
    token: float  # of one token
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """The gap of one proven sync, in nats."""

    mean: float
    largest: float
    square: float  # root of the mean square


class Expectation:
    """Of one server. Without digests nothing is learned: what is not proven is not usual.

        expectation = Expectation("bfloat16", tolerance=None)
        check_canary(canary, ours, theirs, allowed=expectation.allowed, version=7)
        expectation.follow(ours, theirs, version=7)
        expectation.learn(ours, theirs, version=7)

    `tolerance` in nats, if it is given, alone decides: then nothing is learned, and no movement is judged.
    """

    def __init__(self, dtype: str, *, tolerance: float | None) -> None:
        self._dtype = dtype
        self._tolerance = tolerance
        self._seen: deque[Seen] = deque(maxlen=WINDOW)
        self._unsure: list[Seen] = []  # since the movement was last judged: an ignored update may be among them
        self._start: tuple[int, np.ndarray, np.ndarray] | None = None  # version, trainer's and engine's logprobs
        self.follows: float | None = None  # the share at which the engine's logprobs last moved with the trainer's

    @property
    def is_learned(self) -> bool:
        """Whether enough syncs have been seen."""
        return self._tolerance is None and len(self._seen) >= NUM_FIRST

    @property
    def allowed(self) -> Allowed:
        """What the next sync may show."""
        if self._tolerance is not None:
            return Allowed(mean=self._tolerance, token=ONE_TOKEN * self._tolerance, reason="sync.tolerance")
        ceiling = CEILING[self._dtype]
        if not self.is_learned:
            reason = f"the default for {self._dtype}; sync.tolerance sets it"
            return Allowed(mean=ceiling, token=ONE_TOKEN * ceiling, reason=reason)
        usual = max(seen.mean for seen in self._seen)
        mean = min(ceiling, max(FLOOR[self._dtype], MARGIN * usual))
        token = min(ONE_TOKEN * ceiling, max(ONE_TOKEN * mean, MARGIN * max(seen.largest for seen in self._seen)))
        reason = (
            f"the last {len(self._seen)} syncs showed {usual:.2g} at most, in {self._dtype}; sync.tolerance sets it"
        )
        return Allowed(mean=mean, token=token, reason=reason)

    def follow(self, trainer: Sequence[Floats], engine: Sequence[Floats], *, version: int) -> None:
        """Raise SyncError if the trainer's logprobs have moved, by more than rounding can hide, and the engine's have
        not moved with them. Small movements add up until they can be judged."""
        ours, theirs = _flat(trainer), _flat(engine)
        if not self.is_learned or self._start is None:
            return
        since, ours_then, theirs_then = self._start
        moved, followed = ours - ours_then, theirs - theirs_then
        usual = np.arange(len(moved)) != np.abs(moved - followed).argmax()  # one token may be off by much
        moved, followed = moved[usual], followed[usual]
        square = float(moved @ moved)
        # Both ends have an honest gap of this size, of either sign, in every token.
        noise = math.sqrt(2.0) * max(FLOOR[self._dtype] / MARGIN, max(seen.square for seen in self._seen))
        if FOLLOWS * math.sqrt(square) < CERTAIN * noise:
            return
        self.follows = float(followed @ moved) / square
        if self.follows < FOLLOWS:
            raise SyncError(
                f"after the sync to version {version} the engine's logprobs of the canary have not moved with the "
                f"trainer's: these moved by {math.sqrt(square / len(moved)):.3g} nats (root mean square) since version "
                f"{since}, and the engine's by {self.follows:.0%} of that; expected about 100 %, at least "
                f"{FOLLOWS:.0%}. The engine ignores updates, whatever its digests say"
            )
        self._start = (version, ours, theirs)
        self._seen.extend(self._unsure)
        self._unsure.clear()

    def learn(self, trainer: Sequence[Floats], engine: Sequence[Floats], *, version: int) -> None:
        """Note a sync whose digests and canary have passed."""
        ours, theirs = _flat(trainer), _flat(engine)
        gap = np.abs(ours - theirs)
        seen = Seen(mean=float(gap.mean()), largest=float(gap.max()), square=float(np.sqrt((gap * gap).mean())))
        if self.is_learned:
            self._unsure = [*self._unsure, seen][-WINDOW:]
        else:
            self._seen.append(seen)
        if self._start is None:
            self._start = (version, ours, theirs)


def _flat(scores: Sequence[Floats]) -> np.ndarray:
    return np.concatenate(scores).astype(np.float64)
