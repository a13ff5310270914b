"""What a run records at each step: metrics, a few sample rollouts, and a line for the console."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from atropos_exp.batching import token_advantages
from atropos_exp.interfaces import Logger
from atropos_exp.metrics import summarize
from atropos_exp.runs.files import RunFiles
from atropos_exp.types import Dropped, Floats, Rollout, RolloutGroup, SampleRecord, SyncStats, UpdateStats


class RunRecorder:
    """The `Recorder` of rank 0: writes metrics.jsonl and samples/ of the run folder, then tells the `logger`."""

    def __init__(self, *, folder: Path, logger: Logger, tokenizer: Any, num_samples: int, sample_every: int) -> None:
        self._folder = folder
        self._logger = logger
        self._tokenizer = tokenizer
        self._num_samples = num_samples
        self._sample_every = sample_every
        self._files: RunFiles | None = None

    def resume(self, step: int) -> None:
        """Continue after `step` finished steps; a new run (0) begins with the row of step 0."""
        self._files = RunFiles(self._folder, first_step=step + 1 if step else 0)

    def record(
        self,
        *,
        step: int,
        groups: Sequence[RolloutGroup],
        advantages: Sequence[Floats],
        sync: SyncStats,
        evaluation: Mapping[str, float],
        seconds: Mapping[str, float],
        dropped: Dropped | None = None,
        update: UpdateStats | None = None,
        counters: Mapping[str, float] | None = None,
    ) -> None:
        """Record a step; samples only every `sample_every` steps, and at the first."""
        metrics = summarize(
            step=step,
            groups=groups,
            dropped=dropped or Dropped(reasons={}),
            update=update,
            sync=sync,
            seconds=seconds,
            policy_version=max(0, step - 1),
            eval=evaluation,
            extra=counters,
        )
        assert self._files is not None, "resume() comes before the first record()"
        self._files.log(metrics)
        if groups and (step == 1 or step % self._sample_every == 0):
            samples = self._samples(step, groups, advantages)
            self._files.samples(step, samples)
            self._logger.samples(step, samples)
        self._logger.log(metrics)

    def _samples(self, step: int, groups: Sequence[RolloutGroup], advantages: Sequence[Floats]) -> list[SampleRecord]:
        """The best and the worst rollout of the first groups."""
        records = []
        for group, group_advantages in list(zip(groups, advantages, strict=True))[: self._num_samples]:
            order = sorted(range(len(group.rollouts)), key=lambda at: -group.rollouts[at].reward)
            for at in dict.fromkeys((order[0], order[-1])):
                records.append(self._sample(step, group, group.rollouts[at], float(group_advantages[at])))
        return records

    def _sample(self, step: int, group: RolloutGroup, rollout: Rollout, advantage: float) -> SampleRecord:
        start = int(rollout.trained.argmax())
        return SampleRecord(
            prompt_id=group.prompt_id,
            prompt=self._tokenizer.decode(rollout.token_ids[:start]),
            completion=self._tokenizer.decode(rollout.token_ids[start:]),
            reward=rollout.reward,
            advantage=float(token_advantages(rollout, advantage)[rollout.trained].mean()),
            lag=step - 1 - rollout.policy_version,
            finish=rollout.finish.value,
        )


class SilentRecorder:
    """The `Recorder` of the other ranks, which records nothing."""

    def resume(self, step: int) -> None: ...

    def record(self, **facts: object) -> None: ...
