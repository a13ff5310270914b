"""What a run needs before anything heavy starts: tokenizer, prompts, held-out prompts, canary, reward. Rank 0 only."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from atropos_exp.config.check import Checked
from atropos_exp.runs.folder import RunFolder
from atropos_exp.types import Prompt, TokenIds

if TYPE_CHECKING:
    from atropos_exp.interfaces import PromptLoader, Scorer


@dataclass(frozen=True, kw_only=True, slots=True)
class Material:
    """What only rank 0 has and can be checked before anything is started: prompts, and who scores answers."""

    tokenizer: Any
    loader: PromptLoader
    held_out: list[Prompt]
    canary: list[TokenIds]
    scorer: Scorer


def gather_material(checked: Checked, folder: RunFolder, model_folder: Path, stack: ExitStack) -> Material:
    """Raises UserError for what is wrong with data or reward."""
    from atropos_exp.parts.reward.pool import RewardPool

    run, parts = checked.run, checked.parts
    scorer = stack.enter_context(
        RewardPool(
            parts["reward"], num_workers=parts["reward"].num_workers, timeout_seconds=parts["reward"].timeout_seconds
        )
    )
    tokenizer = parts["model"].tokenizer(model_folder)
    prepared_folder = prepare(parts["data"].prepare)
    loader = parts["data"].loader(
        tokenizer,
        seed=run.seed,
        max_prompt_length=run.max_prompt_length,
        max_response_length=run.max_response_length,
        run_folder=folder.path,
        prepared_folder=prepared_folder,
    )
    print(loader.counts, flush=True)
    held_out: list[Prompt] = []
    if parts["eval"].num_prompts and parts["data"].has_eval:
        held_out = parts["data"].eval_prompts(
            tokenizer,
            num_prompts=parts["eval"].num_prompts,
            max_prompt_length=run.max_prompt_length,
            prepared_folder=prepared_folder,
        )
    scorer.score([])  # a reward that cannot be loaded says so here
    return Material(
        tokenizer=tokenizer,
        loader=loader,
        held_out=held_out,
        canary=_canary(loader, run.sync.canary_prompts, tokenizer),
        scorer=scorer,
    )


def prepare(settings: Any) -> Path | None:
    """The data set that the configuration asks to build, built unless it is there already."""
    if settings is None:
        return None
    from data_prep.prepare import ensure

    return ensure(settings)


def _canary(loader: PromptLoader, num_prompts: int, tokenizer: Any) -> list[TokenIds]:
    """Whole conversations, so that every position that a rollout can have is scored: prompt and reference answer."""
    start = loader.state()
    prompts = loader.take(num_prompts)
    loader.restore(start)
    return [
        np.array([*prompt.token_ids, *tokenizer.encode(prompt.ground_truth, add_special_tokens=False)], np.int32)[:512]
        for prompt in prompts
    ]
