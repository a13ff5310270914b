"""Whether the weights arrived: what was sent, compared with what the engine expects, holds and computes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from atropos_exp.errors import SyncError
from atropos_exp.types import Floats, TokenIds
from atropos_exp.weights.digest import Digests
from atropos_exp.weights.expectation import Allowed
from atropos_exp.weights.tensors import Kind, dtype_name, some

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True)
class SentTensors:
    """What the trainer's side sent during one update."""

    kinds: dict[str, Kind] = field(default_factory=dict)  # name -> (dtype, shape)
    digests: Digests = field(default_factory=Digests)  # of the tensors as they were sent
    num_bytes: int = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Count a tensor that is about to be sent. Raises SyncError if it was sent before."""
        if name in self.kinds:
            raise SyncError(f"the trainer gave {name} twice")
        self.kinds[name] = (dtype_name(tensor), tuple(tensor.shape))
        self.num_bytes += tensor.nbytes


def check_complete(sent: Mapping[str, Kind], expected: Mapping[str, Kind]) -> None:
    """Raise SyncError unless every expected tensor was sent with its dtype and shape. More may have been sent: the
    engine refuses what it does not know."""
    missing = [name for name in expected if name not in sent]
    if missing:
        raise SyncError(f"{some(missing)} of {len(expected)} tensors never sent to the engine")
    for name, want in expected.items():
        if sent[name] != want:
            got = sent[name]
            raise SyncError(f"{name} sent as {got[0]} {list(got[1])}, but the engine holds {want[0]} {list(want[1])}")


def check_digests(sent: Mapping[str, str], held: Mapping[str, str], expected: Iterable[str]) -> int:
    """Raise SyncError unless each tensor that the engine holds has the bits that were sent. Returns how many were
    compared: all, or none for an engine that gives no digests."""
    if not held:
        return 0
    unknown = [name for name in expected if name not in held]
    if unknown:
        raise SyncError(f"the engine gave no digest of {some(unknown)}")
    wrong = [name for name in expected if held[name] != sent[name]]
    if wrong:
        raise SyncError(f"the engine holds other bits than were sent of {some(wrong)} ({len(wrong)} tensors differ)")
    return len(held)


def check_finite(trainer: Sequence[Floats]) -> None:
    """Raise SyncError unless the trainer's own logprobs of the canary are finite."""
    for index, ours in enumerate(trainer):
        if not np.isfinite(ours).all():
            raise SyncError(
                f"canary prompt {index}: a logprob is not finite in the trainer itself ({ours}): its weights hold NaN "
                "or infinity"
            )


def check_canary(
    canary: Sequence[TokenIds], trainer: Sequence[Floats], engine: Sequence[Floats], *, allowed: Allowed, version: int
) -> tuple[float, float]:
    """Largest and mean |engine - trainer| logprob over the canary's tokens, in nats.

    `canary`: prompts [T]; `trainer` and `engine`: the logprobs [T - 1] of each prompt's tokens from the second on.
    Raises SyncError if the mean or one token is above what is `allowed`: rounding errors of 16 bits are large for
    single tokens, but not in the mean.
    """
    if len(trainer) != len(canary) or len(engine) != len(canary):
        raise SyncError(f"canary: {len(canary)} prompts, but scores of {len(trainer)} and {len(engine)}")
    worst, largest, gaps = "", 0.0, []
    for index, (prompt, ours, theirs) in enumerate(zip(canary, trainer, engine, strict=True)):
        if len(ours) != len(prompt) - 1 or len(theirs) != len(prompt) - 1:
            raise SyncError(f"canary prompt {index}: {len(prompt)} tokens, scores of {len(ours)} and {len(theirs)}")
        gap = np.abs(ours.astype(np.float64) - theirs.astype(np.float64))
        if not np.isfinite(gap).all():
            raise SyncError(f"canary prompt {index}: a logprob is not finite (trainer {ours}, engine {theirs})")
        gaps.append(gap)
        if gap.max() > largest:
            place = int(gap.argmax())
            largest = float(gap[place])
            worst = (
                f"canary prompt {index}, token {place + 1}: the engine gives {theirs[place]:.6f} nats and the trainer "
                f"{ours[place]:.6f}"
            )
    mean = float(np.concatenate(gaps).mean())
    if mean > allowed.mean or largest > allowed.token:
        raise SyncError(
            f"{worst} after the sync to version {version}; they differ by {mean:.3g} in the mean, and may by "
            f"{allowed.mean:.3g}, one token by {allowed.token:.3g} ({allowed.reason}). The engine does not serve the "
            "trainer's weights"
        )
    return largest, mean
