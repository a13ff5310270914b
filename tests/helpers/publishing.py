"""A trainer that is honest but does not train, and the publisher of its weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from atropos_exp.parts.trainer.hub_names import HubNames
from atropos_exp.types import Floats, TokenIds, TrainBatch, UpdateStats
from atropos_exp.weights.publisher import WeightPublisher
from tests.helpers.random_models import plain_logprobs, random_prompts

CANARY = random_prompts([4, 9, 6], seed=5)


class HeldModel:
    """A `PolicyTrainer` over a plain transformers model whose "update" is whatever the test does to it."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.num_given = 0

    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self.model.named_parameters():
            self.num_given += 1
            yield name, parameter

    def on_hub(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        return HubNames(self.model, self.model.state_dict()).convert(tensors)

    def logprobs(self, sequences: Sequence[TokenIds], *, temperature: float) -> list[Floats]:
        return [plain_logprobs(self.model, sequence, temperature) for sequence in sequences]

    def disturb(self, scale: float = 0.05) -> None:
        """Every weight changes, as by an update."""
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter += scale * torch.randn_like(parameter)

    def wander(self, by: float) -> None:
        """Every matrix goes this share of the way to random ones of its size, so that none grows for ever."""
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.dim() == 2:
                    size = self.model.config.initializer_range
                    parameter.mul_(math.sqrt(1 - by * by)).add_(by * size * torch.randn_like(parameter))

    def update(self, batch: TrainBatch) -> UpdateStats:
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        raise NotImplementedError

    def load(self, folder: Path) -> None:
        raise NotImplementedError


def manage(trainer: Any, engine: Any, **changes: Any) -> WeightPublisher:
    values: dict[str, Any] = {
        "bucket_bytes": 40_000,
        "canary": CANARY,
        "temperature": 0.8,
        "tolerance": 1e-4,
        "recheck": False,
    }
    return WeightPublisher(trainer, engine, is_rank_zero=True, **{**values, **changes})
