"""Held-out evaluation: greedy accuracy and sampled pass@k on prompts that are never trained on."""

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from atropos_exp.config.settings import Index, Settings
from atropos_exp.interfaces import Engine, Scorer
from atropos_exp.metrics import slug
from atropos_exp.parts.eval.estimators import mean_interval, pass_at_k
from atropos_exp.runs.seeds import derive_seed
from atropos_exp.types import Prompt, RewardFailure, SamplingParams


class HeldOut(Settings):
    """The settings of `conf/eval`."""

    every: Index  # steps between evaluations
    num_prompts: Index
    samples_per_prompt: Annotated[int, Field(ge=0, le=10**5)]  # k of pass@k; 0: greedy only
    temperature: Annotated[float, Field(ge=0, le=10)]  # of the sampled answers; the greedy ones are at 0
    correct_at: Annotated[float, Field(ge=-1e9, le=1e9)]  # an answer with at least this reward is correct


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldOutEvaluator:
    """An `Evaluator`. The same prompts and seeds at every call, so two evaluations differ by the policy alone."""

    settings: HeldOut
    prompts: list[Prompt]
    engine: Engine
    scorer: Scorer
    tokenizer: Any
    stop_token_ids: tuple[int, ...]
    max_tokens: int  # of one answer
    seed: int  # the run's

    def __call__(self, policy_version: int) -> dict[str, float]:
        """Accuracy and pass@k of each data source with 95 % intervals, by metric name, and the number of answers that
        could not be scored; those count as wrong."""
        if not self.prompts:
            return {}
        greedy, num_failed = self._answer(temperature=0.0, num_samples=1)
        num_sampled = self.settings.samples_per_prompt
        sampled = None
        if num_sampled:
            sampled, failed = self._answer(temperature=self.settings.temperature, num_samples=num_sampled)
            num_failed += failed

        values = {"eval/reward_failures": float(num_failed)}
        sources = [prompt.data_source for prompt in self.prompts]
        problems = self._problems()
        for name in dict.fromkeys(sources):
            rows = np.array([source == name for source in sources])
            values |= eval_metrics(
                name=name,
                correct=greedy[rows, 0],
                problems=problems[rows],
                num_correct=sampled[rows].sum(1) if sampled is not None else None,
                num_samples=num_sampled,
                k=num_sampled,
            )
        return values

    def _problems(self) -> NDArray[np.int64]:
        """A number for each prompt, equal where the texts are, up to case and spacing."""
        texts = self.tokenizer.batch_decode([prompt.token_ids for prompt in self.prompts])
        numbers: dict[str, int] = {}
        normalised = (" ".join(text.lower().split()) for text in texts)
        return np.array([numbers.setdefault(text, len(numbers)) for text in normalised], np.int64)

    def _answer(self, *, temperature: float, num_samples: int) -> tuple[NDArray[np.bool_], int]:
        """Which answers are correct, bool [prompts, samples], and the number of answers without a score."""
        sampling = SamplingParams(
            temperature=temperature,
            top_p=1.0,
            top_k=0,
            max_tokens=self.max_tokens,
            stop_token_ids=self.stop_token_ids,
            seed=derive_seed(self.seed, "eval"),
        )
        samples = self.engine.generate([prompt.token_ids for prompt in self.prompts], sampling, num_samples=num_samples)
        flat = [sample.token_ids for group in samples for sample in group]
        texts = self.tokenizer.batch_decode(flat, skip_special_tokens=True)
        owners = [prompt for prompt in self.prompts for _ in range(num_samples)]
        scores = self.scorer.score(list(zip(texts, owners, strict=True)))
        num_failed = sum(isinstance(score, RewardFailure) for score in scores)
        correct = [not isinstance(score, RewardFailure) and score >= self.settings.correct_at for score in scores]
        return np.array(correct).reshape(len(self.prompts), num_samples), num_failed


def eval_metrics(
    *,
    name: str,
    correct: NDArray[np.bool_],
    problems: NDArray[np.integer] | None = None,
    num_correct: NDArray[np.integer] | None = None,
    num_samples: int = 0,
    k: int = 0,
) -> dict[str, float]:
    """Metrics of the held-out set `name`, with 95 % intervals.

    `correct` [N] says which greedy answers were right. `problems` [N] numbers the problem of each, which the intervals
    count once; None: all differ. `num_correct` [N] counts the right ones among `num_samples`
    sampled answers, for pass@k; None leaves it out.
    """
    prefix, num = f"eval/{slug(name)}", len(correct)
    accuracy = float(np.mean(correct)) if num else float("nan")
    num_distinct = num if problems is None else len(np.unique(problems))
    values: dict[str, float] = {
        f"{prefix}/num": num,
        f"{prefix}/num_distinct": num_distinct,
        f"{prefix}/accuracy": accuracy,
    }
    if num:
        low, high = mean_interval(correct.astype(np.float64), problems)
        values |= {f"{prefix}/accuracy_ci_low": low, f"{prefix}/accuracy_ci_high": high}
    if num and num_correct is not None:
        estimates = pass_at_k(num_correct=num_correct, num_samples=num_samples, k=k)
        low, high = mean_interval(estimates, problems)
        values[f"{prefix}/pass_at_{k}"] = float(np.mean(estimates))
        values |= {f"{prefix}/pass_at_{k}_ci_low": low, f"{prefix}/pass_at_{k}_ci_high": high}
    return values
