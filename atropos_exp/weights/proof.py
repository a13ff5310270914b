"""Did the weights arrive? The account of what was sent, against what the engine expects and holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from atropos_exp.errors import SyncError
from atropos_exp.types import Floats, TokenIds
from atropos_exp.weights.digest import Digests
from atropos_exp.weights.tensors import Kind, dtype_name, some

if TYPE_CHECKING:
    from torch import Tensor

ONE_TOKEN = 10.0  # by how much one token of the canary may exceed the tolerance of the mean


@dataclass(kw_only=True)
class Account:
    """What the sender handed over during one update."""

    kinds: dict[str, Kind] = field(default_factory=dict)  # name -> (dtype, shape)
    digests: Digests = field(default_factory=Digests)  # of what went on the line
    num_bytes: int = 0

    def add(self, name: str, tensor: Tensor) -> None:
        if name in self.kinds:
            raise SyncError(f"the trainer gave {name} twice")
        self.kinds[name] = (dtype_name(tensor), tuple(tensor.shape))
        self.num_bytes += tensor.nbytes


def check_complete(sent: Mapping[str, Kind], expected: Mapping[str, Kind]) -> None:
    """Every expected tensor was sent, with its dtype and shape. More may have been sent: the engine judges those."""
    missing = [name for name in expected if name not in sent]
    if missing:
        raise SyncError(f"{some(missing)} of {len(expected)} tensors never sent to the engine")
    for name, want in expected.items():
        if sent[name] != want:
            got = sent[name]
            raise SyncError(f"{name} sent as {got[0]} {list(got[1])}, but the engine holds {want[0]} {list(want[1])}")


def check_digests(sent: Mapping[str, str], held: Mapping[str, str], expected: Iterable[str]) -> int:
    """Each tensor that the engine holds has the bits that were sent. Returns how many were compared: all or,
    for an engine that cannot tell, none."""
    if not held:
        return 0
    untold = [name for name in expected if name not in held]
    if untold:
        raise SyncError(f"the engine gave no digest of {some(untold)}")
    wrong = [name for name in expected if held[name] != sent[name]]
    if wrong:
        raise SyncError(f"the engine holds other bits than were sent of {some(wrong)} ({len(wrong)} tensors differ)")
    return len(held)


def check_finite(trainer: Sequence[Floats]) -> None:
    """The trainer's own logprobs of the canary are numbers: no engine can serve weights that are not."""
    for index, ours in enumerate(trainer):
        if not np.isfinite(ours).all():
            raise SyncError(
                f"canary prompt {index}: a logprob is not finite in the trainer itself ({ours}): its weights hold NaN "
                "or infinity"
            )


def check_canary(
    canary: Sequence[TokenIds], trainer: Sequence[Floats], engine: Sequence[Floats], *, tolerance: float, version: int
) -> tuple[float, float]:
    """Largest and mean |engine - trainer| logprob over the canary's tokens, in nats. SyncError if the mean is above
    `tolerance` or one token above `ONE_TOKEN` times it: rounding errors of 16 bits are large for single tokens, but
    not in the mean."""
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
    if mean > tolerance or largest > ONE_TOKEN * tolerance:
        raise SyncError(
            f"{worst} after the sync to version {version}; they differ by {mean:.3g} in the mean, and may by "
            f"{tolerance:g}, one token by {ONE_TOKEN * tolerance:g} (sync.tolerance). The engine does not serve the "
            "trainer's weights"
        )
    return largest, mean
