"""`reward=reasoning_gym`: the score that a reasoning_gym task's own verifier gives."""

import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from atropos_exp.errors import UserError
from atropos_exp.parts.reward.base import PooledReward
from atropos_exp.parts.reward.numbers import after_thoughts
from atropos_exp.types import Prompt


class ReasoningGym(PooledReward):
    """Scores what stands between <answer> and </answer> with the `score_answer` of the prompt's task.

    `prompt.extra_info` holds `task`, a name of the library, and `entry`, its data set's entry as JSON.
    """

    require_tag: bool

    def warm_up(self) -> None:
        import reasoning_gym  # noqa: F401

    def __call__(self, answer: str, prompt: Prompt) -> float:
        """A score in [0, 1], partial for some tasks. Raises UserError if the prompt is not from reasoning_gym."""
        from reasoning_gym.utils import extract_answer

        info = prompt.extra_info
        if not isinstance(info.get("task"), str) or not isinstance(info.get("entry"), str):
            raise UserError(
                f"reward=reasoning_gym got prompt {prompt.prompt_id!r} with extra_info keys {sorted(info)}; expected "
                "task and entry, as data_prep.reasoning_gym writes them. Choose the reward that fits the data"
            )
        answer = after_thoughts(answer)
        tagged = extract_answer(answer)
        if tagged is None and self.require_tag:
            return 0.0
        text = answer.strip() if tagged is None else tagged
        return float(_scorer(info["task"])(text, json.loads(info["entry"])))


@lru_cache(maxsize=256)
def _scorer(task: str) -> Callable[[str, dict[str, Any]], float]:
    from reasoning_gym.factory import DATASETS, get_score_answer_fn

    if task not in DATASETS:
        raise UserError(f"the data names the reasoning_gym task {task!r}, which the installed version does not have")
    scorer: Callable[[str, dict[str, Any]], float] = get_score_answer_fn(task)
    return scorer
