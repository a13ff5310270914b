"""What a run records at each step: metrics, a few sample rollouts, and a line for the console."""

from pathlib import Path
from typing import Any

from atropos_exp.batching import token_advantages
from atropos_exp.interfaces import Logger
from atropos_exp.metrics import summarize
from atropos_exp.runs.files import RunFiles
from atropos_exp.types import Rollout, SampleRecord, StepFacts

NUM_SAMPLES, SAMPLE_EVERY = 4, 10  # groups whose rollouts are shown as text, and every how many steps


class RunRecorder:
    """The `Recorder` of rank 0: writes metrics.jsonl and samples/ of the run folder, then tells the `logger`."""

    def __init__(self, *, folder: Path, logger: Logger, tokenizer: Any) -> None:
        self._folder = folder
        self._logger = logger
        self._tokenizer = tokenizer
        self._files: RunFiles | None = None

    def resume(self, step: int) -> None:
        """Continue after `step` finished steps; a new run (0) begins with the row of step 0."""
        self._files = RunFiles(self._folder, first_step=step + 1 if step else 0)

    def record(self, facts: StepFacts) -> None:
        """Record a step; samples only every `SAMPLE_EVERY` steps, and at the first."""
        metrics = summarize(facts)
        assert self._files is not None, "resume() comes before the first record()"
        self._files.log(metrics)
        if facts.groups and (facts.step == 1 or facts.step % SAMPLE_EVERY == 0):
            samples = self._samples(facts)
            self._files.samples(facts.step, samples)
            self._logger.samples(facts.step, samples)
        self._logger.log(metrics)

    def _samples(self, facts: StepFacts) -> list[SampleRecord]:
        """The best and the worst rollout of the first groups."""
        records = []
        for group, advantages in list(zip(facts.groups, facts.advantages, strict=True))[:NUM_SAMPLES]:
            order = sorted(range(len(group.rollouts)), key=lambda at: -group.rollouts[at].reward)
            for at in dict.fromkeys((order[0], order[-1])):
                lag = facts.policy_version - group.rollouts[at].policy_version
                records.append(self._sample(group.prompt_id, group.rollouts[at], float(advantages[at]), lag))
        return records

    def _sample(self, prompt_id: str, rollout: Rollout, advantage: float, lag: int) -> SampleRecord:
        start = int(rollout.trained.argmax())
        return SampleRecord(
            prompt_id=prompt_id,
            prompt=self._tokenizer.decode(rollout.token_ids[:start]),
            completion=self._tokenizer.decode(rollout.token_ids[start:]),
            reward=rollout.reward,
            advantage=float(token_advantages(rollout, advantage)[rollout.trained].mean()),
            lag=lag,
            finish=rollout.finish.value,
        )


class SilentRecorder:
    """The `Recorder` of the other ranks, which records nothing."""

    def resume(self, step: int) -> None: ...

    def record(self, facts: StepFacts) -> None: ...
