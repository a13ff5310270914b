"""From a checked configuration to the parts of a run, in working order. What it starts, the exit stack stops."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from atropos_exp.assembly.check import Checked
from atropos_exp.assembly.colocated import Update, taking_turns
from atropos_exp.assembly.gap import GapJudge, GapLimit, coarser
from atropos_exp.assembly.head import Head, prepare, start_head
from atropos_exp.assembly.model import TriedModel, try_model
from atropos_exp.assembly.resync import Resync, ResyncedEvaluator, ResyncedSource, of_rank_zero
from atropos_exp.interfaces import AdvantageEstimator, Engine, Evaluator, PolicyTrainer, Recorder, RolloutSource
from atropos_exp.loop import Schedule
from atropos_exp.parts.model.hf_folder import copy_description
from atropos_exp.processes import stopping
from atropos_exp.processes.ranks import Ranks
from atropos_exp.runs.checkpoints import Checkpoints
from atropos_exp.runs.folder import RunFolder
from atropos_exp.runs.recorder import SilentRecorder
from atropos_exp.runs.snapshots import Snapshots
from atropos_exp.weights.publisher import WeightPublisher


@dataclass(frozen=True, kw_only=True, slots=True)
class Assembly:
    """Everything that `loop.train` is called with, and what the end of the run needs."""

    schedule: Schedule
    source: RolloutSource
    estimate: AdvantageEstimator
    update: Update
    publisher: Resync
    evaluate: Evaluator
    recorder: Recorder
    checkpoints: Snapshots
    head: Head | None  # rank 0's


def assemble(checked: Checked, folder: RunFolder, ranks: Ranks, stack: ExitStack) -> Assembly:
    """Start everything. Collective. Raises UserError for what could only be found by trying."""
    run, parts = checked.run, checked.parts
    model_folder = ranks.folder_on_every_node(parts.model.fetch)
    tried = ranks.on_zero(lambda: try_model(checked, model_folder, folder.path / "tmp.twin", stack))
    ranks.on_zero(stopping.check)
    prepared = ranks.keep_on_zero(lambda: prepare(checked, folder, model_folder, stack))
    ranks.on_zero(stopping.check)
    trainer, engine = _start_trainer_and_engine(checked, folder, model_folder, tried, ranks, stack)
    ranks.on_zero(stopping.check)
    head = ranks.keep_on_zero(
        lambda: start_head(checked, folder, of_rank_zero(prepared), of_rank_zero(engine), model_folder, stack)
    )
    publisher = WeightPublisher(
        trainer,
        engine,
        is_rank_zero=ranks.is_zero,
        bucket_bytes=run.sync.bucket_mb * 2**20,
        canary=ranks.broadcast(prepared.canary if prepared is not None else []),
        temperature=run.temperature,
        tolerance=run.sync.tolerance,
        recheck=run.sync.recheck,
    )
    gate = head.gateway if head is not None else None
    condemn = head.source.condemn if head is not None else None
    resync = Resync(publisher, engine, ranks, max_restarts=parts.engine.max_restarts, gate=gate, condemn=condemn)
    source = ResyncedSource(head.source if head is not None else None, resync)
    dtype = coarser(
        parts.model.compute_dtype(checked.device), ranks.broadcast(engine.dtype if engine is not None else "")
    )
    checkpoints = Snapshots(
        Checkpoints(folder.path / "checkpoints", keep=run.checkpoint.keep, ranks=ranks),
        trainer=trainer,
        source=source,
        describe=partial(copy_description, model_folder),
        is_zero=ranks.is_zero,
    )
    return Assembly(
        schedule=Schedule(
            max_steps=parts.trainer.max_steps,
            groups_per_step=run.batch_size,
            eval_every=parts.eval.every,
            save_every=run.checkpoint.every,
            temperature=run.temperature,
        ),
        source=source,
        estimate=parts.advantage,
        update=taking_turns(trainer.update, resync) if parts.engine.colocate else trainer.update,
        publisher=resync,
        evaluate=ResyncedEvaluator(head.evaluate if head is not None else None, resync),
        recorder=GapJudge(
            head.recorder if head is not None else SilentRecorder(),
            GapLimit(dtype, max_gap=run.sync.max_gap),
            trainer,
            temperature=run.temperature,
            condemn=condemn,
        ),
        checkpoints=checkpoints,
        head=head,
    )


def _start_trainer_and_engine(
    checked: Checked, folder: RunFolder, model_folder: Path, tried: TriedModel, ranks: Ranks, stack: ExitStack
) -> tuple[PolicyTrainer, Engine | None]:
    """Both load at the same time. The engine is rank 0's; None elsewhere."""
    parts = checked.parts

    def start_engine() -> Engine:
        engine = parts.engine.start(
            model_folder=model_folder,
            device=checked.device,
            log_folder=folder.path / "log",
            max_sequence_length=checked.max_sequence_length,
            lora=parts.model.lora,
            twin=tried.twin,
            trust_remote_code=parts.model.trust_remote_code,
        )
        stack.callback(engine.stop)
        return engine

    with ThreadPoolExecutor(1) as background:
        starting = background.submit(start_engine) if ranks.is_zero else None
        trainer = parts.trainer.start(
            model_folder=model_folder,
            model=parts.model,
            loss=parts.loss,
            seed=checked.run.seed,
            device=checked.device,
            dump_folder=folder.path / "bad_batches",
            layout=tried.layout,
        )
    return trainer, ranks.keep_on_zero(lambda: of_rank_zero(starting).result())
