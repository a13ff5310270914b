"""What rank 0 alone has: prompts, rewards, gateway and environments, rollouts, evaluation, logs."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from atropos_exp.assembly.atropos import Outside, read_atropos, start_gateway, start_outside, tracker_group
from atropos_exp.assembly.check import Checked
from atropos_exp.config.freeze import resolved
from atropos_exp.interfaces import Engine, Evaluator, Logger, PromptLoader, RolloutSource, Scorer
from atropos_exp.parts.data.settings import PrepareSettings
from atropos_exp.parts.eval.held_out import HeldOutEvaluator
from atropos_exp.parts.gateway.client import GatewayClient
from atropos_exp.parts.rollout.journaled import JournaledSource
from atropos_exp.parts.rollout.local import LocalSource
from atropos_exp.runs.folder import RunFolder
from atropos_exp.runs.recorder import RunRecorder
from atropos_exp.types import Prompt, RunDescription, SamplingParams, TokenIds

MAX_CANARY_TOKENS = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """What is ready before trainer and engine load: all that can be found wrong without them."""

    tokenizer: Any
    loader: PromptLoader
    held_out: list[Prompt]
    canary: list[TokenIds]  # sequences on which every weight sync is proven
    scorer: Scorer
    outside: Outside | None  # Atropos' programs, which load meanwhile


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """What rank 0 samples, evaluates and records with."""

    gateway: GatewayClient | None  # None without Atropos
    source: JournaledSource
    evaluate: Evaluator
    logger: Logger
    recorder: RunRecorder
    libraries: Mapping[str, str]  # versions in the engine's environment


def prepare(checked: Checked, folder: RunFolder, model_folder: Path, stack: ExitStack) -> Prepared:
    """Raises UserError for what is wrong with data or reward."""
    from atropos_exp.parts.reward.pool import RewardPool

    run, parts = checked.run, checked.parts
    reward = parts.reward
    scorer = stack.enter_context(
        RewardPool(reward, num_workers=reward.num_workers, timeout_seconds=reward.timeout_seconds)
    )
    tokenizer = parts.model.tokenizer(model_folder)
    prepared_folder = prepared_data(parts.data.prepare)
    loader = parts.data.loader(
        tokenizer,
        seed=run.seed,
        max_prompt_length=run.max_prompt_length,
        max_response_length=run.max_response_length,
        run_folder=folder.path,
        prepared_folder=prepared_folder,
    )
    print(loader.counts, flush=True)
    held_out: list[Prompt] = []
    if parts.eval.num_prompts and parts.data.has_eval:
        held_out = parts.data.eval_prompts(
            tokenizer,
            num_prompts=parts.eval.num_prompts,
            max_prompt_length=run.max_prompt_length,
            prepared_folder=prepared_folder,
        )
        if len(held_out) < parts.eval.num_prompts:
            print(f"eval.num_prompts is {parts.eval.num_prompts:,}, but {len(held_out):,} are held out", flush=True)
    scorer.score([])  # a reward that cannot be loaded says so here
    return Prepared(
        tokenizer=tokenizer,
        loader=loader,
        held_out=held_out,
        canary=_canary(loader, run.sync.canary_prompts, tokenizer),
        scorer=scorer,
        outside=start_outside(checked, folder, model_folder=model_folder, stack=stack),
    )


def preparation_problems(settings: PrepareSettings | None) -> list[str]:
    """What stands in the way of building that data set, a line each, found without building it."""
    if settings is None:
        return []
    from data_prep.prepare import preflight

    return preflight(settings)


def prepared_data(settings: PrepareSettings | None) -> Path | None:
    """The folder of the data set that the configuration asks to build, built unless it is there already."""
    if settings is None:
        return None
    from data_prep.prepare import ensure

    return ensure(settings)


def _canary(loader: PromptLoader, num_prompts: int, tokenizer: Any) -> list[TokenIds]:
    """Whole conversations, so that every position that a rollout can have is scored: prompt and reference answer."""
    start = loader.state()
    prompts = loader.take(num_prompts)
    loader.restore(start)
    answers = [tokenizer.encode(prompt.ground_truth, add_special_tokens=False) for prompt in prompts]
    return [
        np.array([*prompt.token_ids, *answer], np.int32)[:MAX_CANARY_TOKENS]
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def start_head(
    checked: Checked, folder: RunFolder, prepared: Prepared, engine: Engine, model_folder: Path, stack: ExitStack
) -> Head:
    """What needs a running engine."""
    run, parts = checked.run, checked.parts
    stop_token_ids = parts.model.stop_token_ids(model_folder)
    gateway = remote = None
    if (outside := prepared.outside) is not None:
        gateway = start_gateway(checked, folder, outside, engine, model_folder=model_folder, stack=stack)
        remote = read_atropos(checked, folder, outside, gateway, engine, model_folder=model_folder, stack=stack)
    local = LocalSource(
        loader=prepared.loader,
        engine=engine,
        scorer=prepared.scorer,
        tokenizer=prepared.tokenizer,
        sampling=SamplingParams(
            temperature=run.temperature,
            top_p=run.top_p,
            top_k=run.top_k,
            max_tokens=run.max_response_length,
            stop_token_ids=stop_token_ids,
            seed=run.seed,
        ),
        group_size=run.group_size,
        seed=run.seed,
        mask_truncated=parts.rollout.mask_truncated,
    )
    if remote is not None and parts.rollout.falls_back and not checked.falls_back:
        chosen: RolloutSource = remote
    else:
        chosen = parts.rollout.choose(local=local, remote=remote)
    source = JournaledSource(chosen, folder.path / "rollouts")
    evaluate = HeldOutEvaluator(
        settings=parts.eval,
        prompts=prepared.held_out,
        engine=engine,
        scorer=prepared.scorer,
        tokenizer=prepared.tokenizer,
        stop_token_ids=stop_token_ids,
        max_tokens=run.max_response_length,
        seed=run.seed,
    )
    logger = parts.logger.start(
        RunDescription(
            folder=folder.path,
            config=resolved(checked.config),
            name=run.name,
            total_steps=parts.trainer.max_steps,
            resumed=folder.resumed,
            group=tracker_group(checked, folder) if parts.rollout.uses_atropos else None,
        )
    )
    return Head(
        gateway=gateway,
        source=source,
        evaluate=evaluate,
        logger=logger,
        recorder=RunRecorder(folder=folder.path, logger=logger, tokenizer=prepared.tokenizer),
        libraries=engine.libraries(),
    )
