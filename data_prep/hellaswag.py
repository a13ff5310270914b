"""HellaSwag, which ending continues a text best (Zellers et al. 2019, https://arxiv.org/abs/1905.07830).

python -m data_prep.hellaswag --out outputs/data/hellaswag [--from FOLDER]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from atropos_exp.parts.data.raw import HELLASWAG, LETTERS, VerlRow
from data_prep.builder import AS_RUN, Builder, Draft, argument, prompt_text
from data_prep.hub_builder import draft_from_hub

if TYPE_CHECKING:
    from atropos_exp.interfaces import Reward


class Hellaswag(Builder):
    """Four endings, one letter. Train: 39905; test: the 10042 validation rows, as the test split has no labels."""

    NAME: ClassVar[str] = "hellaswag"
    VERSION: ClassVar[int] = 1
    MAX_UNSCORABLE: ClassVar[float] = 0.0
    MAY_HANG: ClassVar[bool] = False

    dataset: str = argument("Rowan/hellaswag", "Hugging Face id")
    config: str | None = argument(None, "its configuration")
    revision: str | None = argument(None, "commit or tag of the data set; none: the newest")
    from_folder: str | None = argument(None, "local copy in place of the hub: save_to_disk output, or its files")
    max_train: int | None = argument(None, "first rows only", ge=1, le=10**9)
    max_test: int | None = argument(None, "first rows only", ge=1, le=10**9)

    def draft(self) -> Draft:
        return draft_from_hub(
            HELLASWAG,
            dataset=self.dataset,
            config=self.config,
            revision=self.revision,
            from_folder=self.from_folder,
            test_splits=("validation",),
            max_train=self.max_train,
            max_test=self.max_test,
        )

    def reward(self) -> Reward:
        from atropos_exp.parts.reward.exact import Exact

        return Exact(extract=None, last_line=False, ignore_case=False, **AS_RUN)

    def gold(self, row: VerlRow) -> str:
        """The letter in front of the labelled ending, read from the prompt."""
        info = row["extra_info"]
        ending = info["endings"][int(info["label"])]
        lines = prompt_text(row).splitlines()
        return next(letter for letter in LETTERS if f"{letter}. {ending}" in lines)

    def wrong(self, row: VerlRow) -> str:
        return next(letter for letter in LETTERS if letter != LETTERS[int(row["extra_info"]["label"])])


if __name__ == "__main__":
    from data_prep.cli import main

    raise SystemExit(main(Hellaswag))
