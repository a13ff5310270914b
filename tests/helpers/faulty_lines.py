"""Lines between trainer and engine that lose, change or break what they carry. The engine behind them is real."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from atropos_exp.parts.engine.servers import Servers

Bucket = Sequence[tuple[str, torch.Tensor]]
SQUARE = "model.layers.1.self_attn.q_proj.weight"
MATRIX = "model.layers.1.self_attn.q_proj.lora_B.weight"


class FaultyLine:
    """An engine, but with a faulty line for weights in front of it. Everything else is the real server's."""

    def __init__(self, engine: Servers) -> None:
        self._engine = engine
        self.dtype, self.version, self.score = engine.dtype, engine.version, engine.score
        self.transfers_on_device = engine.transfers_on_device
        self.replicas = engine.replicas

    @contextmanager
    def updating(self, version: int) -> Iterator[Any]:
        with self._engine.updating(version) as receiver:
            self._receiver = receiver
            yield self

    @property
    def hub_names(self) -> bool:
        hub_names: bool = self._receiver.hub_names
        return hub_names

    def expected(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        expected: Mapping[str, tuple[str, tuple[int, ...]]] = self._receiver.expected()
        return expected

    def receive(self, bucket: Bucket) -> None:
        self._receiver.receive(bucket)

    def digests(self) -> Mapping[str, str]:
        digests: Mapping[str, str] = self._receiver.digests()
        return digests


class LosesOne(FaultyLine):
    which = SQUARE

    def receive(self, bucket: Bucket) -> None:
        super().receive([(name, tensor) for name, tensor in bucket if name != self.which])


class TransposesOne(FaultyLine):
    """Its elements come in the order of the transposed; the shape is as it was."""

    which = SQUARE

    def receive(self, bucket: Bucket) -> None:
        def transposed(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.T.contiguous().view(tensor.shape)

        super().receive([(name, transposed(tensor) if name == self.which else tensor) for name, tensor in bucket])


class DeliversOld(FaultyLine):
    """The new version arrives with the weights of the last one, or with those of a given model."""

    def __init__(self, engine: Servers, old: Any) -> None:
        super().__init__(engine)
        self.old = {name: tensor.clone() for name, tensor in old.named_parameters()}

    def receive(self, bucket: Bucket) -> None:
        super().receive([(name, self.old[name]) for name, _ in bucket])


class DeliversOldAndCannotTell(DeliversOld):
    def digests(self) -> Mapping[str, str]:
        return {}


class BreaksHalfWay(FaultyLine):
    def __init__(self, engine: Servers) -> None:
        super().__init__(engine)
        self.num_left = 3

    def receive(self, bucket: Bucket) -> None:
        if self.num_left == 0:
            raise ConnectionError("the line is cut")
        self.num_left -= 1
        super().receive(bucket)
