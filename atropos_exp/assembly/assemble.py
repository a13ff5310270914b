"""From a checked configuration to the parts of a run, in working order. What it starts, the exit stack stops."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import OmegaConf

from atropos_exp.assembly.atropos import grouped_logger, read_atropos, start_gateway, start_outside
from atropos_exp.assembly.colocated import ColocatedTrainer
from atropos_exp.assembly.material import Material, gather_material
from atropos_exp.assembly.resync import RankZeroSource, Resync, ResyncedEvaluator, ResyncedSource
from atropos_exp.config.check import Checked
from atropos_exp.loop import Schedule
from atropos_exp.parts.model.hf_folder import copy_description
from atropos_exp.parts.rollout.journaled import JournaledSource
from atropos_exp.parts.rollout.local import LocalSource
from atropos_exp.processes.ranks import Ranks
from atropos_exp.runs.checkpoints import Checkpoints
from atropos_exp.runs.folder import RunFolder
from atropos_exp.runs.recorder import RunRecorder, SilentRecorder
from atropos_exp.runs.snapshots import Snapshots
from atropos_exp.types import SamplingParams, TokenIds

if TYPE_CHECKING:
    from atropos_exp.interfaces import (
        AdvantageEstimator,
        Engine,
        Evaluator,
        Logger,
        PolicyTrainer,
        Publisher,
        Recorder,
        RemoteSource,
        RolloutSource,
    )
    from atropos_exp.parts.gateway.client import GatewayClient


@dataclass(frozen=True, kw_only=True, slots=True)
class Assembly:
    """Everything that `loop.train` is called with, and what the end of the run needs."""

    schedule: Schedule
    source: RolloutSource
    estimate: AdvantageEstimator
    trainer: PolicyTrainer
    publisher: Resync
    evaluate: Evaluator
    recorder: Recorder
    checkpoints: Snapshots
    logger: Logger | None  # rank 0
    engine_libraries: Mapping[str, str]  # rank 0: versions in the engine's environment


def assemble(checked: Checked, folder: RunFolder, ranks: Ranks, stack: ExitStack) -> Assembly:
    """Start everything. Collective. Raises UserError for what could only be found by trying."""
    run, parts = checked.run, checked.parts
    model_folder = ranks.folder_on_every_node(parts["model"].fetch)
    material: Material | None = None

    def gather() -> list[TokenIds]:
        nonlocal material
        material = gather_material(checked, folder, model_folder, stack)
        return material.canary

    canary = ranks.on_zero(gather)
    outside = start_outside(checked, folder, model_folder=model_folder, stack=stack) if ranks.is_zero else None
    trainer, engine = _start_trainer_and_engine(checked, folder, model_folder, ranks, stack)
    gateway: GatewayClient | None = None
    if engine is not None and outside is not None:
        gateway = start_gateway(checked, folder, outside, engine, model_folder=model_folder, stack=stack)
    publisher = _sharding_manager(checked, trainer, engine, canary, ranks)
    max_restarts = getattr(parts["engine"], "max_restarts", 0)
    resync = Resync(publisher, engine, ranks, max_restarts=max_restarts, gate=gateway)
    recorder: Recorder = SilentRecorder()
    logger: Logger | None = None
    inner: RolloutSource | None = None
    evaluate: Evaluator = _no_evaluation
    if material is not None and engine is not None:
        remote: RemoteSource | None = None
        if outside is not None and gateway is not None:
            remote = read_atropos(checked, folder, outside, gateway, engine, model_folder=model_folder, stack=stack)
        rollouts = _start_rollout(checked, material, engine, remote, model_folder)
        inner = JournaledSource(rollouts, folder.path / "rollouts")
        evaluate = _start_evaluation(checked, material, engine, model_folder)
        logger = grouped_logger(checked, folder).start(
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
        source=ResyncedSource(source, resync),
        estimate=parts["advantage"],
        trainer=ColocatedTrainer(trainer, resync) if getattr(parts["engine"], "colocate", False) else trainer,
        publisher=resync,
        evaluate=ResyncedEvaluator(evaluate, resync, ranks),
        recorder=recorder,
        checkpoints=checkpoints,
        logger=logger,
        engine_libraries=engine.libraries() if engine is not None else {},
    )


def _start_trainer_and_engine(
    checked: Checked, folder: RunFolder, model_folder: Path, ranks: Ranks, stack: ExitStack
) -> tuple[PolicyTrainer, Engine | None]:
    """Both load at the same time. The engine is rank 0's; None elsewhere."""
    parts = checked.parts
    adapter = {"lora": parts["model"].lora} if getattr(parts["engine"], "lora", "merged") == "adapter" else {}

    def start_engine() -> Engine:
        engine: Engine = parts["engine"].start(
            model_folder=model_folder,
            device=checked.device,
            log_folder=folder.path / "log",
            max_sequence_length=checked.run.max_prompt_length + checked.run.max_response_length,
            **adapter,
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


def _start_rollout(
    checked: Checked, material: Material, engine: Engine, remote: RemoteSource | None, model_folder: Path
) -> RolloutSource:
    run = checked.run
    local = LocalSource(
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
        mask_truncated=checked.parts["rollout"].mask_truncated,
    )
    source: RolloutSource = checked.parts["rollout"].choose(local=local, remote=remote)
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


def _sharding_manager(
    checked: Checked, trainer: PolicyTrainer, engine: Engine | None, canary: list[TokenIds], ranks: Ranks
) -> Publisher:
    from atropos_exp.weights.publisher import ShardingManager

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
