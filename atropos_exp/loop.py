"""The training loop: restore, sample, compare, pack, update, publish, evaluate, record, save."""

from collections.abc import Callable
from dataclasses import dataclass

from atropos_exp.batching import pack
from atropos_exp.errors import StopRequested
from atropos_exp.interfaces import AdvantageEstimator, Checkpointer, Evaluator, Publisher, Recorder, RolloutSource
from atropos_exp.metrics import Clock
from atropos_exp.types import StepFacts, TrainBatch, UpdateStats


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """How long to train, and how often to evaluate and save. Steps count from 1."""

    max_steps: int
    groups_per_step: int
    eval_every: int  # 0: only before the first and after the last step
    save_every: int  # 0: only after the last step
    temperature: float  # of the sampler; the trainer scores under the same

    def is_due(self, every: int, step: int) -> bool:
        """Whether something done every `every` steps is due after `step`; it always is after the last one."""
        return step == self.max_steps or (every > 0 and step % every == 0)


def train(
    schedule: Schedule,
    *,
    source: RolloutSource,
    estimate: AdvantageEstimator,
    update: Callable[[TrainBatch], UpdateStats],
    publisher: Publisher,
    evaluate: Evaluator,
    recorder: Recorder,
    checkpoints: Checkpointer,
    should_stop: Callable[[], bool],
) -> int:
    """Train to `schedule.max_steps` or until `should_stop`; return the number of finished steps.

    Step k is the k-th update. After it the policy version is k, and its line in metrics.jsonl says k. Step 0 is
    the untrained policy: only synced and evaluated.
    """
    done = saved = checkpoints.restore()
    recorder.resume(done)
    clock = Clock()
    with clock("sync"):
        sync = publisher.publish(done)
    if done == 0:
        with clock("eval"):
            scores = evaluate(0)
        recorder.record(
            StepFacts(step=0, groups=[], advantages=[], sync=sync, evaluation=scores, seconds=clock.seconds)
        )

    clock = Clock()
    for step in range(done + 1, schedule.max_steps + 1):
        try:
            with clock("rollout"):
                groups, dropped = source.take(schedule.groups_per_step, step=step)
        except StopRequested:  # while it waited: the steps before are done
            if done > saved:
                checkpoints.save(done)
            break
        with clock("advantage"):
            advantages = estimate(groups)
        with clock("pack"):
            batch = pack(groups, advantages, temperature=schedule.temperature, version=step - 1)
        with clock("update"):
            stats = update(batch) if batch is not None else None
        with clock("sync"):
            sync = publisher.publish(step)
        with clock("eval"):
            scores = evaluate(step) if schedule.is_due(schedule.eval_every, step) else {}
        seconds, clock = clock.seconds, Clock()  # logging and saving count in the next step's line
        with clock("log"):
            recorder.record(
                StepFacts(
                    step=step, groups=groups, advantages=advantages, sync=sync, evaluation=scores, seconds=seconds,
                    dropped=dropped, update=stats, counters=source.counters(),
                )
            )  # fmt: skip
        done, stopping = step, should_stop()
        with clock("save"):
            if stopping or schedule.is_due(schedule.save_every, step):
                checkpoints.save(step)
                saved = step
        if stopping:
            break
    return done
