"""The evaluation of a held-out set, with an engine that knows even numbers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from atropos_exp.parts.eval.estimators import wilson_interval
from atropos_exp.parts.eval.held_out import HeldOut, HeldOutEvaluator
from atropos_exp.parts.model.tiny import WEIGHTS
from atropos_exp.types import Finish, Prompt, RewardFailure, Sample, SamplingParams, TokenIds


@dataclass
class EvenEngine:
    """Answers "N+0=" with N if N is even, else with nothing."""

    tokenizer: Any

    def generate(self, prompts: Sequence[TokenIds], params: SamplingParams, *, num_samples: int) -> list[list[Sample]]:
        return [[self._sample(ids)] * num_samples for ids in prompts]

    def _sample(self, ids: TokenIds) -> Sample:
        number = int(self.tokenizer.decode(ids).strip().split("+")[0])
        answer = self.tokenizer.encode(str(number) if number % 2 == 0 else "?", add_special_tokens=False)
        logprobs = np.zeros(len(answer), np.float32)
        return Sample(token_ids=np.array(answer, np.int32), logprobs=logprobs, finish=Finish.STOP, policy_version=0)


class Equality:
    num_rescored = 0

    def score(self, items: Sequence[tuple[str, Prompt]]) -> list[float | RewardFailure]:
        return [float(text == prompt.ground_truth) for text, prompt in items]


def test_copies_of_a_prompt_count_once_in_the_intervals() -> None:
    """Six problems, each 32 times, some of them in other spacing; four are even."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(WEIGHTS))
    prompts = []
    for copy in range(32):
        for number in (2, 3, 4, 6, 7, 8):
            text = f"{number}+0=" if copy % 3 else f" {number}+0= "
            ids = np.array(tokenizer.encode(text, add_special_tokens=False), np.int32)
            prompts.append(
                Prompt(
                    prompt_id=f"x/{copy}/{number}", data_source="x", text=text, token_ids=ids, ground_truth=str(number)
                )
            )
    evaluator = HeldOutEvaluator(
        settings=HeldOut(every=1, num_prompts=192, samples_per_prompt=2, temperature=1.0, correct_at=1.0),
        prompts=prompts,
        engine=EvenEngine(tokenizer),  # type: ignore[arg-type]
        scorer=Equality(),
        tokenizer=tokenizer,
        stop_token_ids=(1,),
        max_tokens=4,
        seed=0,
    )
    values = evaluator(0)
    assert (values["eval/x/num"], values["eval/x/num_distinct"]) == (192, 6)
    low, high = wilson_interval(mean=4 / 6, num=6)
    for name in ("accuracy", "pass_at_2"):
        assert values[f"eval/x/{name}"] == pytest.approx(4 / 6)
        assert values[f"eval/x/{name}_ci_low"] == pytest.approx(low)
        assert values[f"eval/x/{name}_ci_high"] == pytest.approx(high)
