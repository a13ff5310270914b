r"""MATH, competition problems (Hendrycks et al. 2021, https://arxiv.org/abs/2103.03874).

python -m data_prep.math --out outputs/data/math [--from FOLDER]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from atropos_exp.parts.data.raw import MATH, VerlRow, boxed_answer
from data_prep.builder import AS_RUN, Builder, Draft, argument, ground_truth
from data_prep.hub_builder import draft_from_hub

if TYPE_CHECKING:
    from atropos_exp.interfaces import Reward


class Math(Builder):
    """Competition problems whose answer stands in \\boxed{}. Train: 7500, test: 5000, less duplicates."""

    NAME: ClassVar[str] = "math"
    VERSION: ClassVar[int] = 1
    MAX_UNSCORABLE: ClassVar[float] = 0.02  # answers that are words or pictures in TeX defeat any checker
    MAY_HANG: ClassVar[bool] = True  # sympy may run away with a tower of powers

    dataset: str = argument("DigitalLearningGmbH/MATH-lighteval", "Hugging Face id")
    config: str | None = argument("default", "its configuration")
    revision: str | None = argument(None, "commit or tag of the data set; none: the newest")
    from_folder: str | None = argument(None, "local copy in place of the hub: save_to_disk output, or its files")
    max_train: int | None = argument(None, "first rows only", ge=1, le=10**9)
    max_test: int | None = argument(None, "first rows only", ge=1, le=10**9)

    def draft(self) -> Draft:
        return draft_from_hub(
            MATH,
            dataset=self.dataset,
            config=self.config,
            revision=self.revision,
            from_folder=self.from_folder,
            test_splits=("test",),
            max_train=self.max_train,
            max_test=self.max_test,
        )

    def reward(self) -> Reward:
        from atropos_exp.parts.reward.math_verify import MathVerify

        return MathVerify(float_rounding=6, require_boxed=False, **AS_RUN)

    def gold(self, row: VerlRow) -> str:
        """The data set's own worked solution; with braces added where it boxes without."""
        solution = str(row["extra_info"]["solution"])
        answer = boxed_answer(solution)
        return solution if f"\\boxed{{{answer}}}" in solution else f"{solution}\n\\boxed{{{answer}}}"

    def wrong(self, row: VerlRow) -> str:
        return f"\\boxed{{{ground_truth(row)} + 1729}}"


if __name__ == "__main__":
    from data_prep.cli import main

    raise SystemExit(main(Math))
