"""`conf/data`: prompts in verl's schema, from parquet files or Hugging Face data sets."""

from pathlib import Path
from typing import Any

from atropos_exp.parts.data.evalset import eval_prompts
from atropos_exp.parts.data.loader import AtroposDataLoader
from atropos_exp.parts.data.settings import DataSettings
from atropos_exp.types import Prompt


class VerlData(DataSettings):
    """The settings of `conf/data`, with methods that open the training prompts and the held-out prompts."""

    def loader(
        self,
        tokenizer: Any,
        *,
        seed: int,
        max_prompt_length: int,
        max_response_length: int,
        run_folder: Path,
        prepared_folder: Path | None = None,
    ) -> AtroposDataLoader:
        """Read, check, filter and tokenise everything. Raises UserError with file, row and reason.

        Bad rows are listed in run_folder/quarantine.jsonl. `prepared_folder` is from `data_prep.prepare.ensure`.
        """
        return AtroposDataLoader(
            self, tokenizer, seed=seed, max_prompt_length=max_prompt_length, max_response_length=max_response_length,
            run_folder=run_folder, prepared_folder=prepared_folder,
        )  # fmt: skip

    def eval_prompts(
        self, tokenizer: Any, *, num_prompts: int, max_prompt_length: int, prepared_folder: Path | None = None
    ) -> list[Prompt]:
        """`num_prompts` held-out prompts (or all of fewer), the same for every seed. Raises UserError if none."""
        return eval_prompts(
            self, tokenizer, num_prompts=num_prompts, max_prompt_length=max_prompt_length,
            prepared_folder=prepared_folder,
        )  # fmt: skip
