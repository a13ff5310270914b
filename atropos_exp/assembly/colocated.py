"""Trainer and engine take turns on one GPU: the engine sleeps while the trainer updates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from atropos_exp.interfaces import PolicyTrainer
from atropos_exp.types import Floats, TokenIds, TrainBatch, UpdateStats

if TYPE_CHECKING:
    from torch import Tensor


class Sleeper(Protocol):
    """Who tells the engine to give its memory back (`assembly/resync.py`). Collective."""

    def sleep(self) -> None: ...


class ColocatedTrainer:
    """A `PolicyTrainer` around another one. The engine is woken by the weight sync that follows each update."""

    def __init__(self, trainer: PolicyTrainer, engine: Sleeper) -> None:
        self._trainer = trainer
        self._engine = engine

    def update(self, batch: TrainBatch) -> UpdateStats:
        self._engine.sleep()
        stats = self._trainer.update(batch)
        return_cached_memory()
        return stats

    def logprobs(self, sequences: Sequence[TokenIds], *, temperature: float) -> list[Floats]:
        return self._trainer.logprobs(sequences, temperature=temperature)

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        return self._trainer.parameters()

    def adapter(self, *, with_base: bool) -> Iterator[tuple[str, Tensor]]:
        return self._trainer.adapter(with_base=with_base)

    def save(self, folder: Path) -> None:
        self._trainer.save(folder)

    def load(self, folder: Path) -> None:
        self._trainer.load(folder)


def return_cached_memory() -> None:
    """PyTorch keeps what it has freed; the engine that wakes up is another process and needs it."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
