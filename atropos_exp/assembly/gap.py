"""Whether a step's rollouts were sampled by the weights that it trains: the only proof of what was really sampled."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from atropos_exp.errors import WrongSampler
from atropos_exp.interfaces import PolicyTrainer, Recorder
from atropos_exp.types import RolloutGroup, StepFacts

log = logging.getLogger(__name__)

# Mean |trainer - sampler| logprob of a step's fresh tokens, in nats. Seen where all was right: up to 4e-5 in float32
# (5e-3 with an engine that multiplies with fewer bits), 0.01 to 0.05 in bfloat16 (docs/results/).
CEILING = {"float32": 0.02, "float16": 0.1, "bfloat16": 0.3}  # allowed to any model
FLOOR = {"float32": 2e-3, "float16": 0.02, "bfloat16": 0.1}  # not judged below, however exact the first steps were
NUM_FIRST = 3  # steps that show what is usual for this model, engine and dtype
MARGIN = 4.0  # times the largest of them: it doubles as a policy learns
FAR = 5.0  # times what is allowed: no second step is needed
MIN_TOKENS = 32  # fewer say nothing
MAX_SCORED = 64  # rollouts that are scored for this alone, in a step without an update


class GapLimit:
    """What the gap of a step may be. Every rank has the same.

    limit = GapLimit("bfloat16", max_gap=None)
    limit.judge(7, gap=0.011, num_tokens=4096)  # None, a warning as text, or WrongSampler
    """

    def __init__(self, dtype: str, *, max_gap: float | None) -> None:
        """`dtype`: the coarser one of trainer and engine. `max_gap`: nats, instead of all that is learned."""
        self._dtype = dtype
        self._given = max_gap
        self._first: list[float] = []
        self._last_above: int | None = None  # the step

    @property
    def allowed(self) -> float:
        """Nats."""
        if self._given is not None:
            return self._given
        if len(self._first) < NUM_FIRST:
            return CEILING[self._dtype]
        return min(CEILING[self._dtype], max(FLOOR[self._dtype], MARGIN * max(self._first)))

    def judge(self, step: int, *, gap: float, num_tokens: int) -> str | None:
        """Return a warning if the gap of this step is too large; raise WrongSampler if it is by far, or was in the step
        before as well. A gap that is allowed counts as usual, in the first steps."""
        if num_tokens < MIN_TOKENS or math.isnan(gap):
            return None
        if gap <= self.allowed:
            self._last_above = None
            if len(self._first) < NUM_FIRST:
                self._first.append(gap)
            return None
        before, self._last_above = self._last_above, step
        text = (
            f"step {step}: the trainer's logprobs of {num_tokens} tokens differ from those that the engine sampled "
            f"with by {gap:.3g} nats in the mean, though the same weights (version {step - 1}) should have made both; "
            f"expected at most {self.allowed:.3g} ({self._reason()})"
        )
        if before is None and gap <= FAR * self.allowed:
            return f"{text}. Another such step, or {FAR:g} times as much, ends the run"
        again = f", after step {before}" if before is not None else ""
        raise WrongSampler(
            f"{text}{again}. The engine did not sample from the trainer's weights, or one of the two computes "
            "something else. The step is not saved and its rollouts are put aside; the same command samples it again. "
            "If it comes back: engine.dtype=float32 model.dtype=float32 tells rounding from a fault, and "
            "trainer.layout=rows or engine=hf which side it is; sync.max_gap allows more"
        )

    def _reason(self) -> str:
        if self._given is not None:
            return "sync.max_gap"
        if len(self._first) < NUM_FIRST:
            return f"the default for {self._dtype}"
        return f"the first steps showed {max(self._first):.2g}, in {self._dtype}"


class GapJudge:
    """A `Recorder` around another one, which records the step first: what stops the run is in its metrics. Collective.

    A step without an update has no statistics, and an engine that samples nonsense makes many of them, all rewards
    being equal. So some rollouts of such a step are scored here, by the weights that sampled them.
    """

    def __init__(
        self,
        inner: Recorder,
        limit: GapLimit,
        trainer: PolicyTrainer,
        *,
        temperature: float,
        condemn: Callable[[int], None] | None,
    ) -> None:
        """`temperature`: the run's. `condemn`: puts the rollouts of a step aside; rank 0's."""
        self._inner = inner
        self._limit = limit
        self._trainer = trainer
        self._temperature = temperature
        self._condemn = condemn

    def resume(self, step: int) -> None:
        self._inner.resume(step)

    def record(self, facts: StepFacts) -> None:
        """Record a step. Raises WrongSampler, on every rank."""
        if not facts.groups:
            self._inner.record(facts)
            return
        more = {"policy/fresh_logprob_gap_allowed": self._limit.allowed}
        if facts.update is not None:
            gap, num_tokens = facts.update.fresh_gap_mean, facts.update.num_fresh_tokens
        else:
            gap, num_tokens = self._score(facts.groups, facts.policy_version)
            more["policy/fresh_logprob_gap_mean"] = gap
        self._inner.record(replace(facts, counters={**facts.counters, **more}))
        try:
            warning = self._limit.judge(facts.step, gap=gap, num_tokens=num_tokens)
        except WrongSampler:
            if self._condemn is not None:
                self._condemn(facts.step)
            raise
        if warning is not None and self._condemn is not None:
            log.warning("%s", warning)

    def _score(self, groups: Sequence[RolloutGroup], version: int) -> tuple[float, int]:
        """The mean gap of the first fresh rollouts, and of how many tokens it is; the weights are still theirs."""
        fresh = [
            (rollout, rollout.logprobs)
            for group in groups
            for rollout in group.compared
            if rollout.logprobs is not None
            and rollout.by_engine
            and rollout.policy_version == version
            and rollout.temperature in (None, self._temperature)
        ][:MAX_SCORED]
        if not fresh:
            return math.nan, 0
        scores = self._trainer.logprobs([rollout.token_ids for rollout, _ in fresh], temperature=self._temperature)
        gaps = [
            np.abs(ours - theirs[1:])[rollout.trained[1:]]
            for ours, (rollout, theirs) in zip(scores, fresh, strict=True)
        ]
        flat = np.concatenate(gaps)
        return float(flat.mean()), len(flat)


def coarser(one: str, other: str) -> str:
    """Return the dtype that rounds more."""
    return max(one, other, key=list(CEILING).index)
