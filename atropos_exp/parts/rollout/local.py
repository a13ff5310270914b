"""`rollout=local`: prompts from the data, completions from the engine, scores from the reward; one turn each."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from atropos_exp.config.settings import Settings
from atropos_exp.interfaces import JSON, Engine, PromptLoader, RemoteSource, RolloutSource, Scorer
from atropos_exp.runs.seeds import derive_seed
from atropos_exp.types import Dropped, Finish, Prompt, RewardFailure, Rollout, RolloutGroup, Sample, SamplingParams


class LocalRollout(Settings):
    """Settings of `rollout=local`."""

    mask_truncated: bool  # a completion cut by the token limit counts in its baseline but is not trained on

    uses_atropos: ClassVar[bool] = False
    falls_back: ClassVar[bool] = False

    def choose(self, *, local: RolloutSource, remote: RemoteSource | None) -> RolloutSource:
        """The source to train from: this process's own rollouts."""
        assert remote is None
        return local


@dataclass(frozen=True, kw_only=True, eq=False)
class LocalSource:
    """A `RolloutSource` that samples every group with the weights that the engine serves at that moment."""

    loader: PromptLoader
    engine: Engine
    scorer: Scorer
    tokenizer: Any
    sampling: SamplingParams
    group_size: int
    seed: int
    mask_truncated: bool

    def take(self, num_groups: int, *, step: int) -> tuple[list[RolloutGroup], Dropped]:
        """Sample `group_size` rollouts of each of the next `num_groups` prompts. Those whose reward failed are dropped
        and counted, not replaced, so that a step depends on nothing but seed, step and weights."""
        prompts = self.loader.take(num_groups)
        sampling = replace(self.sampling, seed=derive_seed(self.seed, "rollout", step))
        samples = self.engine.generate([prompt.token_ids for prompt in prompts], sampling, num_samples=self.group_size)
        flat = [sample.token_ids for group in samples for sample in group]
        texts = self.tokenizer.batch_decode(flat, skip_special_tokens=True)
        owners = [prompt for prompt, group in zip(prompts, samples, strict=True) for _ in group]
        scores = iter(self.scorer.score(list(zip(texts, owners, strict=True))))

        dropped: Counter[str] = Counter()
        groups = []
        for prompt, group in zip(prompts, samples, strict=True):
            rollouts = []
            for sample in group:
                score = next(scores)
                if isinstance(score, RewardFailure):
                    dropped[score.reason] += 1
                elif len(sample.token_ids) == 0:
                    dropped["empty_completion"] += 1
                else:
                    rollouts.append(as_rollout(prompt, sample, score, mask_truncated=self.mask_truncated))
            if rollouts:
                groups.append(RolloutGroup(prompt_id=prompt.prompt_id, source="local", rollouts=tuple(rollouts)))
        return groups, Dropped(reasons=dict(dropped))

    def counters(self) -> Mapping[str, float]:
        return {"reward/rescored": self.scorer.num_rescored}

    def state(self) -> JSON:
        return {"loader": self.loader.state()}

    def restore(self, state: JSON) -> None:
        self.loader.restore(state["loader"])


def as_rollout(prompt: Prompt, sample: Sample, reward: float, *, mask_truncated: bool) -> Rollout:
    """Prompt and completion end to end, with the token ids as sampled; trained where the policy sampled."""
    num_prompt = len(prompt.token_ids)
    return Rollout(
        token_ids=np.concatenate([prompt.token_ids, sample.token_ids]).astype(np.int32),
        trained=np.arange(num_prompt + len(sample.token_ids)) >= num_prompt,
        logprobs=np.concatenate([np.zeros(num_prompt, np.float32), sample.logprobs]).astype(np.float32),
        reward=float(reward),
        finish=sample.finish,
        policy_version=sample.policy_version,
        zero_advantage=mask_truncated and sample.finish is Finish.LENGTH,
    )
