"""ScoredData made by hand: good ones of every kind, and bad ones of every kind."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.atropos_conformance import expected
from tests.atropos_conformance.expected import IGNORED, SENTINEL, Group

LONGEST = 136  # tokens that a sequence may have
SPECIAL = 5  # smaller token ids mean something to a tokenizer
# Kind of bad group, and the reason under which it is counted as dropped.
REASONS = {
    "a mask shorter than its tokens": "lengths",
    "4 sequences, 1 mask, 1 score": "lengths",
    "a mask value that is not the token": "mask_value",
    "masks of true and false": "mask_value",
    "a token id beyond the vocabulary": "token_id",
    "a negative token id": "token_id",
    "nothing trained": "no_trained_token",
    "dummy tokens 0..127": "dummy_tokens",
    "a token too many": "too_long",
    "images": "multimodal",
    "distillation": "distillation",
    "logprobs of another length": "lengths",
    "advantages of another length": "lengths",
    "an absurd score": "range",
    "an impossible temperature": "temperature",
    "doubled": "doubled",
    "too old": "stale",
}


class Maker:
    """Random sequences with the logprobs that `weights` give them, as an environment would send them."""

    def __init__(self, weights: Path, *, vocabulary: int, seed: int) -> None:
        self._weights = weights
        self._vocabulary = vocabulary
        self._random = np.random.default_rng(seed)

    def group(
        self,
        scores: Sequence[float],
        *,
        turns: int = 1,
        prompt: Sequence[int] | None = None,
        temperatures: Sequence[float] | None = None,
        noise: float = 0.0,
        length: int | None = None,
        **fields: Any,
    ) -> Group:
        """`turns` of the policy in each sequence, with something untrained between them. `noise`: standard deviation
        that the logprobs are off by. `length`: of the longest sequence."""
        prompt = self._tokens(6) if prompt is None else list(prompt)
        group: Group = {"tokens": [], "masks": [], "scores": list(scores), "inference_logprobs": []}
        for at in range(len(scores)):
            tokens, masks = list(prompt), [IGNORED] * len(prompt)
            for turn in range(turns):
                said = self._tokens(int(self._random.integers(3, 8)))
                if length is not None and at == 0:
                    said = self._tokens(length - len(tokens))
                answer = self._tokens(4) if turn + 1 < turns else []
                tokens, masks = tokens + said + answer, masks + said + [IGNORED] * len(answer)
            right = expected.logprobs(self._weights, tokens, temperature=(temperatures or [1.0] * len(scores))[at])
            off = self._random.normal(0.0, noise, len(right)) if noise else np.zeros(len(right))
            group["tokens"].append(tokens)
            group["masks"].append(masks)
            group["inference_logprobs"].append(
                [
                    SENTINEL if mask == IGNORED else min(0.0, float(value + error))
                    for mask, value, error in zip(masks, right, off, strict=True)
                ]
            )
        return {**group, **fields}

    def per_token(self, group: Group, low: float, high: float) -> list[list[float]]:
        """Random numbers, 0 where nothing is trained."""
        return [
            [0.0 if mask == IGNORED else float(self._random.uniform(low, high)) for mask in masks]
            for masks in group["masks"]
        ]

    def _tokens(self, number: int) -> list[int]:
        return [int(token) for token in self._random.integers(SPECIAL, self._vocabulary, number)]


def _set(group: Group, field: str, value: Any) -> None:
    group[field] = value


def _spoil_token(group: Group, value: int) -> None:
    group["tokens"][1][-1] = group["masks"][1][-1] = value


def _lengthen(group: Group) -> None:
    extra = [7] * (LONGEST + 1 - len(group["tokens"][0]))
    for field in ("tokens", "masks"):
        group[field][0] += extra
    group["inference_logprobs"][0] += [-1.0] * len(extra)


def _dummy(group: Group) -> None:
    """What atroposlib sends where it could not get tokens (ATROPOS_ALLOW_DUMMY_MANAGED_SERVER)."""
    size = len(group["scores"])
    for field, row in (("tokens", list(range(128))), ("masks", list(range(128))), ("inference_logprobs", [-0.5] * 128)):
        group[field] = [list(row) for _ in range(size)]


SPOIL: dict[str, Callable[[Group], Any]] = {
    "a mask shorter than its tokens": lambda group: group["masks"][2].pop(),
    "4 sequences, 1 mask, 1 score": lambda group: group.update(masks=group["masks"][:1], scores=group["scores"][:1]),
    "a mask value that is not the token": lambda group: group["masks"][0].__setitem__(-1, group["tokens"][0][-1] - 1),
    "masks of true and false": lambda group: _set(
        group, "masks", [[value != IGNORED for value in row] for row in group["masks"]]
    ),
    "a token id beyond the vocabulary": lambda group: _spoil_token(group, 384),
    "a negative token id": lambda group: _spoil_token(group, -1),
    "nothing trained": lambda group: group["masks"].__setitem__(3, [IGNORED] * len(group["masks"][3])),
    "dummy tokens 0..127": _dummy,
    "a token too many": _lengthen,
    "images": lambda group: _set(group, "images", ["a picture"]),
    "distillation": lambda group: _set(group, "distill_token_ids", [[[5]] * len(row) for row in group["tokens"]]),
    "logprobs of another length": lambda group: group["inference_logprobs"][0].pop(),
    "advantages of another length": lambda group: _set(group, "advantages", [[1.0]] * 4),
    "an absurd score": lambda group: group["scores"].__setitem__(0, 1e30),
    "an impossible temperature": lambda group: _set(group, "overrides", [{"temperature": -1.0}] * 4),
}


def spoiled(group: Group, kind: str) -> Group:
    bad = copy.deepcopy(group)
    SPOIL[kind](bad)
    return bad
