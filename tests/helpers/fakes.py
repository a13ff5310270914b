"""Small real implementations of the protocols in `atropos_exp/interfaces.py`, in memory: a policy of one weight per
token that truly learns. Each writes down how it was called, and takes its time on a clock that only they turn.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from atropos_exp.interfaces import JSON
from atropos_exp.types import (
    Dropped,
    Finish,
    Floats,
    Rollout,
    RolloutGroup,
    StepFacts,
    SyncStats,
    TokenIds,
    TrainBatch,
    UpdateStats,
)

VOCABULARY, PROMPT = 8, 2  # of the policy; tokens of each prompt


@dataclass
class Book:
    """What was called, in order, and the time by then."""

    calls: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def write(self, call: str, *, takes: float = 0.0) -> None:
        self.calls.append(call)
        self.seconds += takes

    def clock(self) -> float:
        """In place of `time.perf_counter`."""
        return self.seconds


class MemoryTrainer:
    """A `PolicyTrainer`: logits [VOCABULARY], the same after every token."""

    def __init__(self, book: Book, *, takes: float = 0.0) -> None:
        self._book, self._takes = book, takes
        self.logits = torch.zeros(VOCABULARY)

    def update(self, batch: TrainBatch) -> UpdateStats:
        self._book.write("update", takes=self._takes)
        logits = self.logits.clone().requires_grad_()
        logprobs_S = torch.log_softmax(logits, -1)[batch.token_ids_S]
        loss = -(logprobs_S * batch.advantages_S).sum() / batch.num_trained_tokens
        loss.backward()
        assert logits.grad is not None
        self.logits = self.logits - logits.grad
        value = float(loss.detach())
        return UpdateStats(
            loss=value, policy_loss=value, supervised_loss=0.0, grad_norm=float(logits.grad.norm()), learning_rate=1.0,
            entropy=0.0, mismatch_kl=float("nan"), logprob_gap_mean=0.0, logprob_gap_max=0.0, fresh_gap_mean=0.0,
            num_fresh_tokens=batch.num_trained_tokens, importance_truncated_fraction=0.0, clip_fraction=0.0,
            reference_kl=0.0, num_tokens=len(batch.token_ids_S),
            num_trained_tokens=batch.num_trained_tokens, num_micro_batches=1, peak_seconds=float("nan"), skipped=False,
        )  # fmt: skip

    def logprobs(self, sequences: Sequence[TokenIds], *, temperature: float) -> list[Floats]:
        scores = torch.log_softmax(self.logits / temperature, -1).numpy()
        return [scores[ids[1:]] for ids in sequences]

    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield "logits", self.logits

    def adapter(self, *, with_base: bool) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.parameters() if with_base else ()

    def on_hub(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        return tensors

    def save(self, folder: Path) -> None:
        torch.save(self.logits, folder / "logits.pt")

    def load(self, folder: Path) -> None:
        self.logits = torch.load(folder / "logits.pt")


class MemorySource:
    """A `RolloutSource`: completions of one token, rewarded by their id; of the weights that were published last.

    All groups of the steps in `drops` are dropped.
    """

    def __init__(self, book: Book, *, drops: Collection[int] = (), takes: float = 0.0) -> None:
        self._book, self._drops, self._takes = book, drops, takes
        self._taken = 0

    def take(self, num_groups: int, *, step: int) -> tuple[list[RolloutGroup], Dropped]:
        self._book.write(f"take {num_groups} for {step}", takes=self._takes)
        self._taken += num_groups
        if step in self._drops:
            return [], Dropped(reasons={"timeout": num_groups})
        first = self._taken - num_groups
        return [self._group(first + number, step) for number in range(num_groups)], Dropped(reasons={})

    def counters(self) -> Mapping[str, float]:
        return {"atropos/lost_batches": 0.0}

    def state(self) -> JSON:
        return {"taken": self._taken}

    def restore(self, state: JSON) -> None:
        self._taken = state["taken"]

    def _group(self, number: int, step: int) -> RolloutGroup:
        random = np.random.default_rng(number)
        rows = [random.integers(0, VOCABULARY, PROMPT + 1).astype(np.int32) for _ in range(4)]
        trained = np.array([False] * PROMPT + [True])
        rollouts = tuple(
            Rollout(
                token_ids=row, trained=trained, logprobs=None, reward=float(row[-1]), finish=Finish.STOP,
                policy_version=step - 1,
            )
            for row in rows
        )  # fmt: skip
        return RolloutGroup(prompt_id=f"memory/train/{number}", source="local", rollouts=rollouts)


class MeanBaseline:
    """An `AdvantageEstimator`: rewards less their mean."""

    def __init__(self, book: Book, *, takes: float = 0.0) -> None:
        self._book, self._takes = book, takes

    def __call__(self, groups: Sequence[RolloutGroup]) -> list[Floats]:
        self._book.write("estimate", takes=self._takes)
        return [group.rewards - group.rewards.mean() for group in groups]


class MemoryPublisher:
    """A `Publisher`: a copy of the trainer's parameters."""

    def __init__(self, book: Book, trainer: MemoryTrainer, *, takes: float = 0.0) -> None:
        self._book, self._trainer, self._takes = book, trainer, takes
        self.served: dict[str, torch.Tensor] = {}
        self.num_syncs = self.num_verified = 0

    def recheck(self, *, before: int) -> None: ...

    def publish(self, version: int) -> SyncStats:
        self._book.write(f"publish {version}", takes=self._takes)
        self.served = {name: tensor.clone() for name, tensor in self._trainer.parameters()}
        self.num_syncs = self.num_verified = self.num_syncs + 1
        size = sum(tensor.nbytes for tensor in self.served.values())
        return SyncStats(
            policy_version=version, num_tensors=len(self.served), num_bytes=size, seconds=self._takes,
            proof_seconds=0.0, seconds_by_part={}, canary_gap_max=0.0, canary_gap_mean=0.0,
            canary_gap_allowed=0.0, digests_compared=1,
        )  # fmt: skip


class MemoryEvaluator:
    """An `Evaluator`: the probability of the best token under the served weights."""

    def __init__(self, book: Book, publisher: MemoryPublisher, *, takes: float = 0.0) -> None:
        self._book, self._publisher, self._takes = book, publisher, takes

    def __call__(self, policy_version: int) -> dict[str, float]:
        self._book.write(f"evaluate {policy_version}", takes=self._takes)
        return {"eval/memory/accuracy": float(torch.softmax(self._publisher.served["logits"], -1)[-1])}


class MemoryCheckpoints:
    """A `Checkpointer`: weights and the source's state by step, in a folder."""

    def __init__(
        self, book: Book, trainer: MemoryTrainer, source: MemorySource, folder: Path, *, takes: float = 0.0
    ) -> None:
        self._book, self._trainer, self._source, self._folder, self._takes = book, trainer, source, folder, takes

    def restore(self) -> int:
        saved = sorted(self._folder.glob("step_*"))
        self._book.write("restore")
        if not saved:
            return 0
        self._trainer.load(saved[-1])
        self._source.restore(torch.load(saved[-1] / "source.pt"))
        return int(saved[-1].name.removeprefix("step_"))

    def save(self, step: int) -> None:
        self._book.write(f"save {step}", takes=self._takes)
        folder = self._folder / f"step_{step:06d}"
        folder.mkdir()
        self._trainer.save(folder)
        torch.save(self._source.state(), folder / "source.pt")


class MemoryRecorder:
    """A `Recorder` whose lines are what it was given."""

    def __init__(self, book: Book, *, takes: float = 0.0) -> None:
        self._book, self._takes = book, takes
        self.lines: list[dict[str, Any]] = []

    def resume(self, step: int) -> None:
        self._book.write(f"resume {step}")
        self.lines = [line for line in self.lines if line["step"] <= step]

    def record(self, facts: StepFacts) -> None:
        self._book.write(f"record {facts.step}", takes=self._takes)
        self.lines.append({field.name: getattr(facts, field.name) for field in fields(facts)})
