"""The nouns of a run: what its parts hand to each other. Plain data, without I/O or a framework.

    Prompt -> Rollout -> RolloutGroup -> TrainBatch -> UpdateStats -> StepMetrics

Shape suffixes: ``x_NT`` has shape [N, T].
    T = token positions of one sequence (prompt, completion, tool output), in order; P = of one prompt
    G = rollouts of one group
    N = sequences of a batch, all groups flattened
    S = token positions of a whole batch, its sequences laid end to end (packed, no padding)
    R = trained tokens of one sequence, left-aligned

A per-token array is *token-aligned*: entry t is about token t, whose logits are at t - 1. Only the trainer shifts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

TokenIds = NDArray[np.int32]
Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]


class Finish(Enum):
    """Why sampling stopped."""

    STOP = "stop"  # the model ended its turn; the stop token is part of the completion
    LENGTH = "length"  # the token limit cut it


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One task for the policy, already tokenised."""

    prompt_id: str  # stable across runs: "<data_source>/<split>/<index>"
    data_source: str  # verl's name of the data set; rewards may dispatch on it
    text: str  # the last user message, for people
    token_ids: TokenIds  # [P], formatted by the chat template or plain
    ground_truth: str
    is_structured: bool = False  # `ground_truth` is the JSON text of a list or an object
    ability: str = ""
    extra_info: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How tokens are drawn. `temperature=0` is greedy."""

    temperature: float
    top_p: float  # 1.0: off
    top_k: int  # 0: off
    max_tokens: int
    stop_token_ids: tuple[int, ...]
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Sample:
    """One completion of an engine."""

    token_ids: TokenIds  # [R], the stop token included when it ended the turn
    logprobs: Floats  # [R], nats, under the distribution at `temperature` before top-p/top-k
    finish: Finish
    policy_version: int  # of the weights that sampled it


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenScores:
    """One sequence [T] under the policy: its tokens from the second on, and the K likeliest tokens at their places."""

    logprobs: Floats  # [T - 1] nats
    top_token_ids: NDArray[np.int32]  # [T - 1, K], likeliest first
    top_logprobs: Floats  # [T - 1, K] nats


@dataclass(frozen=True, kw_only=True, slots=True)
class Endpoint:
    """The address of one of the engine's servers, for the other processes of the run."""

    kind: str  # "hf": the binary protocol of `wire.py`; "vllm", "sglang": their HTTP interface
    address: str  # "http://127.0.0.1:PORT"
    token: str | None = field(repr=False)  # in its Authorization header; None: it asks for none


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Provenance:
    """What the gateway's ledger knows about a sequence that an environment sent back."""

    policy_version: int  # the oldest weights that sampled a trained token
    logprobs: Floats  # [T] of the behaviour policy, nats; 0.0 where not trained
    temperature: float | None  # of its sampler; None if its completions differ
    returned_before: bool  # every completion in it had been claimed by an earlier lookup
    key: str  # unique per sampled completion (of its first one)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Rollout:
    """One scored sequence. Its arrays have one entry per token; a mismatch or a non-finite number is a ValueError.

    `trained` may be non-contiguous: in a multi-turn episode tool and user tokens are False.

    A `supervised` rollout is an example to imitate: plain cross-entropy on its trained tokens (temperature 1, no
    ratio, no importance weight, no KL). Its reward is reported but compared with no other.
    """

    token_ids: TokenIds  # [T] prompt, completion, and any tool output
    trained: Mask  # [T] True where the policy sampled the token
    logprobs: Floats | None  # [T] of the behaviour policy, nats; 0.0 where not trained; None if unknown
    reward: float
    finish: Finish
    policy_version: int  # the oldest weights that sampled a token of it
    advantages: Floats | None = None  # [T] supplied by the environment: used verbatim for the whole group
    zero_advantage: bool = False  # counts in its group's baseline, contributes no gradient but for a KL term
    reference_logprobs: Floats | None = None  # [T] of the reference policy at `temperature`; 0.0 where not trained
    temperature: float | None = None  # of its sampler; None: the run's
    supervised: bool = False
    by_engine: bool = True  # this run's engine is known to have sampled it; False: an environment says so

    def __post_init__(self) -> None:
        for name in ("trained", "logprobs", "advantages", "reference_logprobs"):
            values = getattr(self, name)
            if values is not None and len(values) != (length := len(self.token_ids)):
                raise ValueError(f"{name} must align with token_ids: got {len(values)} entries for {length} tokens")
            if values is not None and name != "trained" and not np.isfinite(values).all():
                raise ValueError(f"{name} must be finite; got {values[~np.isfinite(values)][0]}")
        if not self.trained.any():
            raise ValueError("a rollout needs at least one trained token")
        if self.trained[0]:
            raise ValueError("the first token of a sequence has no prediction, so it cannot be trained")
        if not np.isfinite(self.reward):
            raise ValueError(f"reward must be finite; got {self.reward}")
        if self.temperature is not None and not 0.0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be a finite number above 0; got {self.temperature}")
        if self.supervised and self.advantages is not None:
            raise ValueError("a supervised rollout has advantage 1 everywhere; advantages must be None")

    @property
    def num_trained(self) -> int:
        """The number of trained tokens."""
        return int(self.trained.sum())


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RolloutGroup:
    """The rollouts of one prompt, whose rewards are compared with each other."""

    prompt_id: str
    source: str  # who sampled it: "local" or "atropos"
    rollouts: tuple[Rollout, ...]

    @property
    def rewards(self) -> NDArray[np.float64]:
        """The rewards [G] of all rollouts. In float32 large ones that differ could be equal."""
        return np.array([rollout.reward for rollout in self.rollouts], dtype=np.float64)

    @property
    def compared(self) -> tuple[Rollout, ...]:
        """The rollouts whose rewards are compared: all but the supervised ones."""
        return tuple(rollout for rollout in self.rollouts if not rollout.supervised)

    @property
    def has_own_advantages(self) -> bool:
        """Whether the environment supplied advantages, which then replace the estimator's for the whole group."""
        return any(rollout.advantages is not None for rollout in self.rollouts)


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardFailure:
    """An answer that could not be scored: it drops its rollout and is counted under `reason`."""

    reason: str  # "timeout", "crashed", "non_finite" or "error:<exception class>"


@dataclass(frozen=True, kw_only=True, slots=True)
class Dropped:
    """How many rollouts did not reach a group, by reason."""

    reasons: Mapping[str, int]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TrainBatch:
    """What one update sees: the sequences of all rollouts, laid end to end and token-aligned."""

    token_ids_S: Tensor  # int64
    lengths_N: Tensor  # int64, sums to S
    trained_S: Tensor  # bool
    advantages_S: Tensor  # float32, 0 where not trained; 1 in supervised sequences
    behaviour_logprobs_S: Tensor  # float32 nats, 0 where not trained or unknown
    has_behaviour_N: Tensor  # bool: this sequence came with behaviour logprobs
    fresh_N: Tensor  # bool: they are those of the very weights that this update trains
    reference_logprobs_S: Tensor  # float32 nats, 0 where not trained or unknown
    has_reference_N: Tensor  # bool: this sequence came with logprobs of the reference policy
    supervised_N: Tensor  # bool: cross-entropy instead of the policy loss
    temperature_N: Tensor  # float32, of each sampler; logits are divided by it before log_softmax
    num_trained_tokens: int  # the loss denominator of token_mean, over the whole batch


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateStats:
    """What the trainer reports about one update. Logprobs and entropy are in nats per trained token."""

    loss: float
    policy_loss: float
    supervised_loss: float  # cross-entropy of the supervised rollouts, as a part of `loss`
    grad_norm: float  # before clipping
    learning_rate: float
    entropy: float
    mismatch_kl: float  # k3 estimate of KL(behaviour || trainer); NaN without behaviour logprobs
    logprob_gap_mean: float  # |trainer - behaviour|
    logprob_gap_max: float
    fresh_gap_mean: float  # |trainer - behaviour| of tokens sampled by the very weights that were trained; NaN: none
    num_fresh_tokens: int  # that this is the mean of
    importance_truncated_fraction: float  # of tokens whose importance weight hit the cap
    clip_fraction: float  # of tokens clipped by the policy loss
    reference_kl: float  # 0 without a reference model
    num_tokens: int  # packed tokens, prompts included
    num_trained_tokens: int
    num_micro_batches: int
    peak_seconds: float  # model FLOPs over the peak of all devices; NaN where that is not known (a CPU)
    skipped: bool  # a non-finite loss or gradient: nothing was applied


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncStats:
    """What one proven weight sync cost, and what its proof showed."""

    policy_version: int
    num_tensors: int
    num_bytes: int
    seconds: float  # open + gather + send + commit
    proof_seconds: float  # digest + canary
    seconds_by_part: Mapping[str, float]
    canary_gap_max: float  # nats, engine versus trainer
    canary_gap_mean: float
    canary_gap_allowed: float  # what the mean might be
    digests_compared: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RunDescription:
    """What a logger is told of the run before its first step."""

    folder: Path
    config: Mapping[str, Any]  # resolved, secrets and all
    name: str
    total_steps: int
    resumed: bool
    group: str | None = None  # that of the run's environments, for a tracker whose own group is null


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StepFacts:
    """What happened in a step."""

    step: int
    groups: Sequence[RolloutGroup]
    advantages: Sequence[Floats]  # [G] of each group
    sync: SyncStats
    evaluation: Mapping[str, float]  # metrics by their full name; empty where none was due
    seconds: Mapping[str, float]  # of a `metrics.Clock`
    dropped: Dropped = field(default_factory=lambda: Dropped(reasons={}))
    update: UpdateStats | None = None  # None: no group had a signal
    counters: Mapping[str, float] = field(default_factory=dict)  # more metrics by their full name

    @property
    def policy_version(self) -> int:
        """The version of the weights that the step trained, before its update."""
        return max(0, self.step - 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMetrics:
    """One step's numbers, by their names in `metrics.py`."""

    step: int
    values: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleRecord:
    """One rollout as text, for people."""

    prompt_id: str
    prompt: str
    completion: str
    reward: float
    advantage: float  # mean over its trained tokens
    lag: int  # policy versions between sampling and training
    finish: str = ""  # stop | length
