"""An Atropos environment of single-turn questions, from the run's data and scored by its reward.

python -m atropos_exp.envs.single_turn serve --env.run_config RUN/config.yaml \
    --env.rollout_server_url http://127.0.0.1:8000 --openai.base_url http://127.0.0.1:9004/v1
"""

import asyncio
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from atropos_exp.processes.startup import load_own, no_collections, tokenizers_only

if __name__ == "__main__":
    with tokenizers_only(), no_collections():
        import atroposlib.envs.base  # noqa: F401

from atropos_exp.envs.base import RunEnv
from atropos_exp.envs.episode import Episode
from atropos_exp.envs.sampler import SampledTurn, SamplerEngine
from atropos_exp.envs.stream import StreamPosition
from atropos_exp.interfaces import PromptLoader, Scorer
from atropos_exp.parts.eval.held_out import HeldOutEvaluator
from atropos_exp.types import Prompt, RewardFailure


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptTask:
    """One prompt, which every rollout of a group answers."""

    place: StreamPosition
    prompt: Prompt


class SingleTurnEnv(RunEnv):
    """Samples the same prompts as `rollout=local` and scores them alike, as a process of its own."""

    name: ClassVar[str] = "single_turn"

    def prepare(self) -> None:
        from atropos_exp.parts.reward.pool import RewardPool

        load_own("data_prep")
        from data_prep.prepare import ensure

        settings, run = self.settings, self.settings.run
        self.scorer: Scorer = RewardPool(
            settings.reward,  # type: ignore[arg-type]
            num_workers=settings.reward.num_workers,
            timeout_seconds=settings.reward.timeout_seconds,
        )
        # The first process builds it, the others wait.
        prepared_folder = None if settings.data.prepare is None else ensure(settings.data.prepare)
        with tempfile.TemporaryDirectory() as folder:  # the trainer lists the bad rows, which are the same
            self.loader: PromptLoader = settings.data.loader(
                self.tokenizer,
                seed=run.seed,
                max_prompt_length=run.max_prompt_length,
                max_response_length=run.max_response_length,
                run_folder=Path(folder),
                prepared_folder=prepared_folder,
            )
        self.held_out: list[Prompt] = []
        if settings.eval.num_prompts and settings.data.has_eval:
            self.held_out = settings.data.eval_prompts(
                self.tokenizer,
                num_prompts=settings.eval.num_prompts,
                max_prompt_length=run.max_prompt_length,
                prepared_folder=prepared_folder,
            )
        self.scorer.score([])  # raises now if the reward cannot be loaded

    async def get_next_item(self) -> PromptTask:
        place = self.stream.next()
        self.loader.restore({**self.loader.state(), "cursor": place.position})
        return PromptTask(place=place, prompt=self.loader.take(1)[0])

    async def collect(self, item: PromptTask) -> dict[str, Any] | None:
        completions = await self.sampler.complete(
            item.prompt.token_ids.tolist(), self.training_params(item.place), num_samples=self.config.group_size
        )
        texts, scores = await asyncio.to_thread(self._score, item.prompt, completions)
        episodes = []
        for completion in completions:
            episode = Episode()
            episode.add_context(completion.prompt_ids)
            episode.add_completion(completion)
            episodes.append(episode)
        failures = [
            score.reason if isinstance(score, RewardFailure) else None if completion.token_ids else "empty_completion"
            for score, completion in zip(scores, completions, strict=True)
        ]
        rewards = [0.0 if isinstance(score, RewardFailure) else score for score in scores]
        group = self.group(episodes, rewards, dropped=failures)
        if self.config.include_messages:
            question = {"role": "user", "content": item.prompt.text}
            group["messages"] = [[question, {"role": "assistant", "content": text}] for text in texts]
        return group

    def _score(self, prompt: Prompt, completions: list[SampledTurn]) -> tuple[list[str], list[float | RewardFailure]]:
        texts = self.decode(completions)
        return texts, self.scorer.score([(text, prompt) for text in texts])

    async def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The trainer's held-out evaluation, through the server that this environment samples from."""
        started, scorer = time.time(), _Listener(self.scorer)
        evaluator = HeldOutEvaluator(
            settings=self.settings.eval,
            prompts=self.held_out,
            engine=SamplerEngine(  # type: ignore[arg-type]
                self.sampler, asyncio.get_running_loop(), timeout_seconds=self.config.worker_timeout
            ),
            scorer=scorer,
            tokenizer=self.tokenizer,
            stop_token_ids=self.stop_token_ids,
            max_tokens=self.config.max_response_length,
            seed=self.settings.run.seed,
        )
        metrics = await asyncio.to_thread(evaluator, 0)
        await self.log_evaluation(
            metrics,
            scorer.heard,
            started,
            temperature=self.settings.eval.temperature,
            samples_per_prompt=self.settings.eval.samples_per_prompt,
        )
        return metrics


class _Listener:
    """A `Scorer` that also records every answer and its score."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self.heard: list[dict[str, Any]] = []

    @property
    def num_rescored(self) -> int:
        return self._scorer.num_rescored

    def score(self, items: Sequence[tuple[str, Prompt]]) -> list[float | RewardFailure]:
        scores = self._scorer.score(items)
        for (answer, prompt), score in zip(items, scores, strict=True):
            failure = score.reason if isinstance(score, RewardFailure) else None
            self.heard.append(
                {
                    "prompt_id": prompt.prompt_id,
                    "question": prompt.text,
                    "ground_truth": prompt.ground_truth,
                    "answer": answer,
                    "score": None if failure else score,
                    "failure": failure,
                }
            )
        return scores


if __name__ == "__main__":
    SingleTurnEnv.main()
