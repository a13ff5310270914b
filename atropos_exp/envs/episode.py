"""A sequence under construction: the environment's tokens are context, the policy's tokens are trained."""

from collections.abc import Iterable, Sequence
from typing import Any

from atropos_exp.envs.sampler import SampledTurn
from atropos_exp.parts.atropos.scored_data import IGNORED, NO_LOGPROB
from atropos_exp.types import Finish


class Episode:
    """Token ids, masks and logprobs, each [T] and unshifted, as the API takes them. Tokens are never re-encoded."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.masks: list[int] = []
        self.logprobs: list[float] = []
        self.turns: list[range] = []  # the positions of each completion
        self.is_truncated = False  # whether the token limit cut one of them

    def __len__(self) -> int:
        return len(self.tokens)

    def add_context(self, token_ids: Iterable[int]) -> None:
        """Append tokens that are not trained."""
        ids = [int(token) for token in token_ids]
        self.tokens += ids
        self.masks += [IGNORED] * len(ids)
        self.logprobs += [NO_LOGPROB] * len(ids)

    def add_completion(self, completion: SampledTurn) -> None:
        """Append a turn of the policy, which is trained."""
        self.turns.append(range(len(self.tokens), len(self.tokens) + len(completion.token_ids)))
        self.tokens += completion.token_ids
        self.masks += completion.token_ids
        self.logprobs += completion.logprobs
        self.is_truncated |= completion.finish is Finish.LENGTH

    def spread(self, values: Sequence[float]) -> list[float]:
        """Per-token values [T] from one value per turn; 0 where nothing is trained."""
        spread = [0.0] * len(self.tokens)
        for turn, value in zip(self.turns, values, strict=True):
            for position in turn:
                spread[position] = value
        return spread


def scored_group(
    episodes: Sequence[Episode],
    scores: Sequence[float],
    *,
    temperature: float,
    mask_truncated: bool,
    advantages: list[list[float]] | None = None,
    dropped: Sequence[str | None] | None = None,
) -> dict[str, Any]:
    """A ScoredDataGroup for the API. `group_overrides` is left out, because atroposlib fails if it is null.

    With `mask_truncated`, episodes that the token limit cut get no gradient. `dropped`: why an episode is left out.
    """
    overrides: list[dict[str, Any]] = [
        {"set_advantage_to_zero": True} if mask_truncated and episode.is_truncated else {} for episode in episodes
    ]
    for override, reason in zip(overrides, dropped or [None] * len(overrides), strict=True):
        if reason is not None:
            override["dropped"] = reason
    return {
        "tokens": [episode.tokens for episode in episodes],
        "masks": [episode.masks for episode in episodes],
        "scores": [float(score) for score in scores],
        "inference_logprobs": [episode.logprobs for episode in episodes],
        "advantages": advantages,
        "messages": None,
        "overrides": overrides if any(overrides) else None,
        "generation_params": {"temperature": temperature},
    }
