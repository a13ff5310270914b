"""The loop itself: who is called when, what a line says, and where a run goes on."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from atropos_exp import metrics
from atropos_exp.errors import StopRequested
from atropos_exp.loop import Schedule, train
from tests.helpers.fakes import (
    Book,
    MeanBaseline,
    MemoryCheckpoints,
    MemoryEvaluator,
    MemoryPublisher,
    MemoryRecorder,
    MemorySource,
    MemoryTrainer,
)

# Seconds, all different, so that a sum of them says which they were.
SECONDS = {"rollout": 1.0, "advantage": 2.0, "update": 4.0, "sync": 8.0, "eval": 16.0, "log": 32.0, "save": 64.0}
STEP = ("take 2 for {0}", "estimate", "update", "publish {0}", "record {0}")


@dataclass
class Loop:
    """A loop of fakes. The same `folder` again is the same run, in a new process."""

    folder: Path
    drops: Collection[int] = ()
    stops_after: int | None = None
    book: Book = field(default_factory=Book)

    def __post_init__(self) -> None:
        book = self.book
        self.trainer = MemoryTrainer(book, takes=SECONDS["update"])
        self.source = MemorySource(book, drops=self.drops, takes=SECONDS["rollout"])
        self.publisher = MemoryPublisher(book, self.trainer, takes=SECONDS["sync"])
        self.recorder = MemoryRecorder(book, takes=SECONDS["log"])

    def train(self, max_steps: int, *, eval_every: int = 0, save_every: int = 0) -> int:
        book = self.book
        return train(
            Schedule(
                max_steps=max_steps, groups_per_step=2, eval_every=eval_every, save_every=save_every, temperature=1.0
            ),
            source=self.source,
            estimate=MeanBaseline(book, takes=SECONDS["advantage"]),
            update=self.trainer.update,
            publisher=self.publisher,
            evaluate=MemoryEvaluator(book, self.publisher, takes=SECONDS["eval"]),
            recorder=self.recorder,
            checkpoints=MemoryCheckpoints(book, self.trainer, self.source, self.folder, takes=SECONDS["save"]),
            should_stop=lambda: bool(self.lines) and self.lines[-1]["step"] == self.stops_after,
        )

    @property
    def calls(self) -> list[str]:
        return self.book.calls

    @property
    def lines(self) -> list[dict[str, Any]]:
        return self.recorder.lines

    def calls_of(self, kind: str) -> list[int]:
        return [int(call.split()[1]) for call in self.calls if call.startswith(f"{kind} ")]


def step_calls(step: int) -> list[str]:
    return [call.format(step) for call in STEP]


def test_every_part_is_called_once_a_step_and_in_order(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    assert loop.train(2) == 2
    assert loop.calls == [
        "restore", "resume 0", "publish 0", "evaluate 0", "record 0",
        *step_calls(1),
        "take 2 for 2", "estimate", "update", "publish 2", "evaluate 2", "record 2", "save 2",
    ]  # fmt: skip


def test_step_zero_is_the_untrained_policy(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.train(1)
    zero, one = loop.lines
    assert (zero["step"], zero["groups"], zero["advantages"], zero["update"]) == (0, [], [], None)
    assert zero["sync"].policy_version == 0
    assert zero["evaluation"] == {"eval/memory/accuracy": pytest.approx(1 / 8)}
    assert one["evaluation"]["eval/memory/accuracy"] > 1 / 8, "it was evaluated after its update was published"


def test_a_line_holds_what_its_step_saw(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.train(3)
    for line in loop.lines[1:]:
        step = line["step"]
        assert [group.prompt_id for group in line["groups"]] == [
            f"memory/train/{2 * step - 2}",
            f"memory/train/{2 * step - 1}",
        ]
        assert {rollout.policy_version for group in line["groups"] for rollout in group.rollouts} == {step - 1}
        for group, advantages in zip(line["groups"], line["advantages"], strict=True):
            assert advantages.tolist() == (group.rewards - group.rewards.mean()).tolist()
        assert line["update"].num_trained_tokens == 8
        assert line["sync"].policy_version == step
        assert line["dropped"].reasons == {} and line["counters"] == {"atropos/lost_batches": 0.0}


def test_what_is_served_is_what_was_trained(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.train(3)
    assert torch.equal(loop.publisher.served["logits"], loop.trainer.logits)
    assert loop.trainer.logits.argmax() == 7, "the best token has become the likeliest"


@pytest.mark.parametrize(
    ("eval_every", "save_every", "evaluated", "saved"),
    [(0, 0, [0, 5], [5]), (2, 3, [0, 2, 4, 5], [3, 5]), (1, 5, [0, 1, 2, 3, 4, 5], [5])],
)
def test_evaluations_and_checkpoints_come_when_they_are_due(
    eval_every: int, save_every: int, evaluated: list[int], saved: list[int], tmp_path: Path
) -> None:
    loop = Loop(tmp_path)
    loop.train(5, eval_every=eval_every, save_every=save_every)
    assert loop.calls_of("evaluate") == evaluated
    assert [line["step"] for line in loop.lines if line["evaluation"]] == evaluated
    assert loop.calls_of("save") == saved


def test_without_a_group_there_is_no_update_and_the_step_counts(tmp_path: Path) -> None:
    loop = Loop(tmp_path, drops={2})
    assert loop.train(3) == 3
    before = loop.calls.index("record 1") + 1
    assert loop.calls[before : before + 4] == ["take 2 for 2", "estimate", "publish 2", "record 2"]
    line = loop.lines[2]
    assert (line["groups"], line["update"], line["dropped"].reasons) == ([], None, {"timeout": 2})
    assert line["sync"].policy_version == 2, "the version goes on with the steps"
    assert loop.calls.count("update") == 2


def test_a_run_goes_on_after_its_newest_checkpoint(tmp_path: Path) -> None:
    whole, first = Loop(tmp_path / "whole"), Loop(tmp_path / "cut", stops_after=3)
    for folder in (whole.folder, first.folder):
        folder.mkdir()
    whole.train(5, save_every=2)
    assert first.train(5, save_every=2) == 3
    second = Loop(tmp_path / "cut")
    second.recorder.lines = [*first.lines, {"step": 4}]  # of a process that died before it saved its fourth step
    assert second.train(5, save_every=2) == 5
    assert second.calls[:4] == ["restore", "resume 3", "publish 3", "take 2 for 4"], "it is not evaluated again"
    assert [line["step"] for line in second.lines] == [0, 1, 2, 3, 4, 5]
    assert torch.equal(second.trainer.logits, whole.trainer.logits)
    for ours, theirs in zip(second.lines, whole.lines, strict=True):
        assert repr(ours["update"]) == repr(theirs["update"])  # NaN is not equal to itself
        assert ours["evaluation"] == theirs["evaluation"]


def test_a_finished_run_is_published_and_left_alone(tmp_path: Path) -> None:
    Loop(tmp_path).train(2)
    again = Loop(tmp_path)
    assert again.train(2) == 2
    assert again.calls == ["restore", "resume 2", "publish 2"]


@pytest.mark.parametrize("save_every", [0, 2])
def test_asked_to_stop_it_finishes_the_step_and_saves_it_once(save_every: int, tmp_path: Path) -> None:
    loop = Loop(tmp_path, stops_after=2)
    assert loop.train(5, save_every=save_every) == 2
    assert loop.calls[-2:] == ["record 2", "save 2"]
    assert loop.calls_of("save") == [2] and loop.calls_of("evaluate") == [0]


@pytest.mark.parametrize(("save_every", "saved"), [(0, [2]), (1, [1, 2])])
def test_a_stop_while_it_waits_for_rollouts_saves_the_steps_before(
    save_every: int, saved: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = Loop(tmp_path)
    take = loop.source.take

    def wait(num_groups: int, *, step: int) -> Any:
        if step == 3:
            raise StopRequested
        return take(num_groups, step=step)

    monkeypatch.setattr(loop.source, "take", wait)
    assert loop.train(5, save_every=save_every) == 2
    assert loop.calls_of("save") == saved
    monkeypatch.undo()
    assert Loop(tmp_path).train(5) == 5
    again = Loop(tmp_path)
    monkeypatch.setattr(again.source, "take", lambda *given, **more: wait(2, step=3))
    assert again.train(6) == 5 and again.calls_of("save") == [], "nothing has happened since it was restored"


def test_seconds_of_logging_and_saving_are_in_the_next_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(tmp_path)
    monkeypatch.setattr(metrics, "perf_counter", loop.book.clock)
    loop.train(3, save_every=1)
    work = {"rollout": 1.0, "advantage": 2.0, "pack": 0.0, "update": 4.0, "sync": 8.0, "eval": 0.0}
    assert [line["seconds"] for line in loop.lines] == [
        {"sync": 8.0, "eval": 16.0, "step": 24.0},
        {**work, "step": 15.0},  # what recording step 0 took is in no line: the first step begins after it
        {**work, "log": 32.0, "save": 64.0, "step": 111.0},
        {**work, "eval": 16.0, "log": 32.0, "save": 64.0, "step": 127.0},
    ]


def test_seconds_before_a_resumed_step_are_in_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Loop(tmp_path, stops_after=1).train(2)
    again = Loop(tmp_path)
    monkeypatch.setattr(metrics, "perf_counter", again.book.clock)
    again.train(2)
    assert [line["seconds"]["sync"] for line in again.lines] == [8.0]
