"""What may happen to weights after their digests were compared, in an engine that reports the right ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from atropos_exp.parts.engine.servers import Servers
from atropos_exp.weights.digest import digest
from tests.helpers.faulty_lines import Bucket, FaultyLine

Change = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
LAYER = "model.layers.1."
Q, K = f"{LAYER}self_attn.q_proj.weight", f"{LAYER}self_attn.k_proj.weight"


class LiesAboutDigests(FaultyLine):
    """Its digests are those of what was sent, whatever it holds: the same as a change after they were compared."""

    change: Change | None = None  # of what the engine gets, which has to come in one bucket
    ignores = False  # it keeps the last weights

    def __init__(self, engine: Servers) -> None:
        super().__init__(engine)
        self.held: dict[str, torch.Tensor] = {}
        self.sent: dict[str, str] = {}

    def receive(self, bucket: Bucket) -> None:
        self.sent |= {name: digest(tensor) for name, tensor in bucket}
        new = {name: tensor.clone() for name, tensor in bucket}
        if not self.ignores:
            self.held |= self.change(new) if self.change is not None else new
        super().receive([(name, self.held[name]) for name in new])

    def digests(self) -> Mapping[str, str]:
        return self.sent


def swap_q_and_k(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of the first heads, as many as k has."""
    q, k = tensors[Q], tensors[K]
    return tensors | {Q: torch.cat([k, q[len(k) :]]), K: q[: len(k)].clone()}


def one_layer_larger(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: 1.5 * value if name.startswith(LAYER) else value for name, value in tensors.items()}
