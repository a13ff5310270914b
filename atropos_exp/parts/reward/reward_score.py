"""`reward=reward_score`: verl's own scorers, chosen by the prompt's data source, as in published verl runs."""

from atropos_exp.errors import UserError
from atropos_exp.parts.reward.base import PooledReward
from atropos_exp.types import Prompt

SAFE = (
    "openai/gsm8k", "lighteval/MATH", "DigitalLearningGmbH/MATH-lighteval", "HuggingFaceH4/MATH-500", "math_dapo",
    "math", "math_dapo_reasoning",
)  # fmt: skip
SAFE_PREFIX = "aime"
# verl scores these with its prime_math and prime_code modules, which evaluate what the model wrote
EVALUATED = ("numina_", "codecontests", "apps", "codeforces", "taco")


class RewardScore(PooledReward):
    """`verl.utils.reward_score.default_compute_score`. Its scale is the scorer's: MATH-DAPO gives -1 or 1."""

    def warm_up(self) -> None:
        from verl.utils.reward_score import gsm8k, math_dapo, math_reward  # noqa: F401

    def __call__(self, answer: str, prompt: Prompt) -> float:
        """Raises UserError for a data source that verl has no scorer for, or one that would run the answer."""
        check_source(prompt.data_source)
        from verl.utils.reward_score import default_compute_score

        score = default_compute_score(prompt.data_source, answer, prompt.ground_truth, dict(prompt.extra_info))
        return float(score["score"] if isinstance(score, dict) else score)


def check_source(data_source: str) -> None:
    """Raise UserError unless verl scores `data_source` by comparing text."""
    if data_source in SAFE or data_source.startswith(SAFE_PREFIX):
        return
    if data_source.startswith(EVALUATED):
        problem = "verl's scorer for it evaluates what the model wrote, which this project does not run"
    else:
        problem = "this reward has no scorer for it"
    raise UserError(
        f"reward=reward_score got a prompt of data_source {data_source!r}: {problem}; expected one of "
        f"{', '.join(SAFE)} or {SAFE_PREFIX}*. Choose another reward, such as reward=math_verify"
    )
