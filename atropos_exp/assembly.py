"""From a checked configuration to the parts of a run, in working order. What it starts, the exit stack stops."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import OmegaConf

from atropos_exp.checkpoint import Checkpoints
from atropos_exp.config_check import Checked
from atropos_exp.loop import Schedule
from atropos_exp.model.hf_folder import copy_description
from atropos_exp.ranks import Ranks
from atropos_exp.recorder import RunRecorder, SilentRecorder
from atropos_exp.rollout.journaled import JournaledSource
from atropos_exp.rollout.rank_zero import RankZeroSource
from atropos_exp.run_folder import RunFolder
from atropos_exp.snapshots import Snapshots
from atropos_exp.types import Prompt, SamplingParams, TokenIds

if TYPE_CHECKING:
    from atropos_exp.interfaces import (
        AdvantageEstimator,
        Engine,
        Evaluator,
        Logger,
        PolicyTrainer,
        PromptLoader,
        Publisher,
        Recorder,
        RolloutSource,
        Scorer,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Assembly:
    """Everything that `loop.train` is called with, and what the end of the run needs."""

    schedule: Schedule
    source: RolloutSource
    estimate: AdvantageEstimator
    trainer: PolicyTrainer
    publisher: Publisher
    evaluate: Evaluator
    recorder: Recorder
    checkpoints: Snapshots
    logger: Logger | None  # rank 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Material:
    """What only rank 0 has and can be checked before anything is started: prompts, and who scores answers."""

    tokenizer: Any
    loader: PromptLoader
    held_out: list[Prompt]
    canary: list[TokenIds]
    scorer: Scorer


def assemble(checked: Checked, folder: RunFolder, ranks: Ranks, stack: ExitStack) -> Assembly:
    """Start everything. Collective. Raises UserError for what could only be found by trying."""
    run, parts = checked.run, checked.parts
    model_folder = ranks.folder_on_every_node(parts["model"].fetch)
    material: Material | None = None

    def gather() -> list[TokenIds]:
        nonlocal material
        material = _gather_material(checked, folder, model_folder, stack)
        return material.canary

    canary = ranks.on_zero(gather)
    trainer, engine = _start_trainer_and_engine(checked, folder, model_folder, ranks, stack)
    publisher = _sharding_manager(checked, trainer, engine, canary, ranks)
    recorder: Recorder = SilentRecorder()
    logger: Logger | None = None
    inner: RolloutSource | None = None
    evaluate: Evaluator = _no_evaluation
    if material is not None and engine is not None:
        inner = JournaledSource(_start_rollout(checked, material, engine, model_folder), folder.path / "rollouts")
        evaluate = _start_evaluation(checked, material, engine, model_folder)
        logger = parts["logger"].start(
            run_folder=folder.path,
            config=OmegaConf.to_container(checked.config, resolve=True),
            name=run.name,
            resumed=folder.resumed,
            total_steps=parts["trainer"].max_steps,
        )
        recorder = RunRecorder(
            folder=folder.path, logger=logger, tokenizer=material.tokenizer, num_samples=4, sample_every=10
        )
    source = inner if inner is not None and ranks.world_size == 1 else RankZeroSource(inner, ranks)
    checkpoints = Snapshots(
        Checkpoints(folder.path / "checkpoints", keep=run.checkpoint.keep, rank=ranks.rank, broadcast=ranks.broadcast),
        trainer=trainer,
        source=source,
        model_folder=model_folder,
        describe=copy_description,
        is_zero=ranks.is_zero,
    )
    return Assembly(
        schedule=Schedule(
            max_steps=parts["trainer"].max_steps,
            groups_per_step=run.batch_size,
            eval_every=parts["eval"].every,
            save_every=run.checkpoint.every,
            temperature=run.temperature,
        ),
        source=source,
        estimate=parts["advantage"],
        trainer=trainer,
        publisher=publisher,
        evaluate=evaluate,
        recorder=recorder,
        checkpoints=checkpoints,
        logger=logger,
    )


def _gather_material(checked: Checked, folder: RunFolder, model_folder: Path, stack: ExitStack) -> Material:
    from atropos_exp.reward.pool import RewardPool

    run, parts = checked.run, checked.parts
    scorer = stack.enter_context(
        RewardPool(
            parts["reward"], num_workers=parts["reward"].num_workers, timeout_seconds=parts["reward"].timeout_seconds
        )
    )
    tokenizer = parts["model"].tokenizer(model_folder)
    prepared_folder = _prepare(parts["data"].prepare)
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


def _start_trainer_and_engine(
    checked: Checked, folder: RunFolder, model_folder: Path, ranks: Ranks, stack: ExitStack
) -> tuple[PolicyTrainer, Engine | None]:
    """Both load at the same time. The engine is rank 0's; None elsewhere."""
    parts = checked.parts

    def start_engine() -> Engine:
        engine: Engine = parts["engine"].start(
            model_folder=model_folder,
            device=checked.device,
            log_folder=folder.path / "log",
            max_sequence_length=checked.run.max_prompt_length + checked.run.max_response_length,
        )
        return engine

    engine = None
    with ThreadPoolExecutor(1) as background:
        starting = background.submit(start_engine) if ranks.is_zero else None
        try:
            trainer = parts["trainer"].start(
                model_folder=model_folder,
                model=parts["model"],
                loss=parts["loss"],
                seed=checked.run.seed,
                device=checked.device,
                dump_folder=folder.path / "bad_batches",
            )
        finally:
            if starting is not None and starting.exception() is None:
                engine = starting.result()
                stack.callback(engine.stop)

    def await_engine() -> None:
        if starting is not None:
            starting.result()  # raises what its start raised

    ranks.on_zero(await_engine)
    return trainer, engine


def _start_rollout(checked: Checked, material: Material, engine: Engine, model_folder: Path) -> RolloutSource:
    run = checked.run
    source: RolloutSource = checked.parts["rollout"].start(
        loader=material.loader,
        engine=engine,
        scorer=material.scorer,
        tokenizer=material.tokenizer,
        sampling=SamplingParams(
            temperature=run.temperature,
            top_p=run.top_p,
            top_k=run.top_k,
            max_tokens=run.max_response_length,
            stop_token_ids=checked.parts["model"].stop_token_ids(model_folder),
            seed=run.seed,
        ),
        group_size=run.group_size,
        seed=run.seed,
    )
    return source


def _start_evaluation(checked: Checked, material: Material, engine: Engine, model_folder: Path) -> Evaluator:
    evaluator: Evaluator = checked.parts["eval"].start(
        prompts=material.held_out,
        engine=engine,
        scorer=material.scorer,
        tokenizer=material.tokenizer,
        stop_token_ids=checked.parts["model"].stop_token_ids(model_folder),
        max_tokens=checked.run.max_response_length,
        seed=checked.run.seed,
    )
    return evaluator


def _prepare(prepare: Any) -> Path | None:
    """The data set that the configuration asks to build, built unless it is there already."""
    if prepare is None:
        return None
    from data_prep.prepare import ensure

    return ensure(prepare)


def _canary(loader: PromptLoader, num_prompts: int, tokenizer: Any) -> list[TokenIds]:
    """Whole conversations, so that every position that a rollout can have is scored: prompt and reference answer."""
    start = loader.state()
    prompts = loader.take(num_prompts)
    loader.restore(start)
    return [
        np.array([*prompt.token_ids, *tokenizer.encode(prompt.ground_truth, add_special_tokens=False)], np.int32)[:512]
        for prompt in prompts
    ]


def _sharding_manager(
    checked: Checked, trainer: PolicyTrainer, engine: Engine | None, canary: list[TokenIds], ranks: Ranks
) -> Publisher:
    from atropos_exp.sharding.manager import ShardingManager

    return ShardingManager(
        trainer,
        engine,
        is_rank_zero=ranks.is_zero,
        bucket_bytes=checked.run.sync.bucket_mb * 2**20,
        canary=canary,
        temperature=checked.run.temperature,
        tolerance=checked.run.sync.tolerance,
    )


def _no_evaluation(policy_version: int) -> dict[str, float]:
    return {}
