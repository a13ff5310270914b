"""GSM8K, grade-school word problems (Cobbe et al. 2021, https://arxiv.org/abs/2110.14168).

python -m data_prep.gsm8k --out outputs/data/gsm8k [--from FOLDER]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from atropos_exp.parts.data.raw import GSM8K, VerlRow
from data_prep.builder import AS_RUN, Builder, Draft, argument, ground_truth
from data_prep.hub_builder import draft_from_hub

if TYPE_CHECKING:
    from atropos_exp.interfaces import Reward


class Gsm8k(Builder):
    """Word problems whose answer is a number after '####'. Train: 7473, test: 1319."""

    NAME: ClassVar[str] = "gsm8k"
    VERSION: ClassVar[int] = 1
    MAX_UNSCORABLE: ClassVar[float] = 0.0
    MAY_HANG: ClassVar[bool] = False

    dataset: str = argument("openai/gsm8k", "Hugging Face id")
    config: str = argument("main", "its configuration")
    revision: str | None = argument(None, "commit or tag of the data set; none: the newest")
    from_folder: str | None = argument(None, "local copy in place of the hub: save_to_disk output, or its files")
    max_train: int | None = argument(None, "first rows only", ge=1, le=10**9)
    max_test: int | None = argument(None, "first rows only", ge=1, le=10**9)

    def draft(self) -> Draft:
        return draft_from_hub(
            GSM8K,
            dataset=self.dataset,
            config=self.config,
            revision=self.revision,
            from_folder=self.from_folder,
            test_splits=("test",),
            max_train=self.max_train,
            max_test=self.max_test,
        )

    def reward(self) -> Reward:
        from atropos_exp.parts.reward.reward_score import RewardScore

        return RewardScore(**AS_RUN)

    def gold(self, row: VerlRow) -> str:
        """The solution that the data set contains."""
        return str(row["extra_info"]["answer"])

    def wrong(self, row: VerlRow) -> str:
        return f"#### {float(ground_truth(row)) + 1:g}"


if __name__ == "__main__":
    from data_prep.cli import main

    raise SystemExit(main(Gsm8k))
