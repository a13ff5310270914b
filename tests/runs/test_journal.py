from __future__ import annotations

import json
import logging
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from atropos_exp.runs.journal import Journal, read_journal, write_journal
from atropos_exp.types import Dropped, Finish, Rollout, RolloutGroup


def random_rollout(rng: np.random.Generator) -> Rollout:
    length = int(rng.integers(2, 40))
    trained = rng.random(length) < 0.6
    trained[0], trained[-1] = False, True
    supervised = bool(rng.random() < 0.2)
    return Rollout(
        token_ids=rng.integers(0, 2**31 - 1, length).astype(np.int32),
        trained=trained,
        logprobs=None if rng.random() < 0.3 else (-rng.exponential(size=length)).astype(np.float32),
        advantages=None if supervised or rng.random() < 0.7 else rng.normal(size=length).astype(np.float32),
        reward=float(rng.normal()),
        finish=Finish.STOP if rng.random() < 0.5 else Finish.LENGTH,
        policy_version=int(rng.integers(0, 100)),
        zero_advantage=bool(rng.random() < 0.2),
        reference_logprobs=None if rng.random() < 0.5 else (-rng.exponential(size=length)).astype(np.float32),
        temperature=None if rng.random() < 0.5 else float(rng.uniform(0.1, 2.0)),
        supervised=supervised,
    )


def example() -> Journal:
    rng = np.random.default_rng(3)
    groups = [
        RolloutGroup(
            prompt_id=f"größer/{at}",
            source="atropos" if at % 3 == 0 else "local",
            rollouts=tuple(random_rollout(rng) for _ in range(int(rng.integers(0, 5)))),
        )
        for at in range(40)
    ]
    return Journal(
        step=12, groups=groups, dropped=Dropped(reasons={"timeout": 2}), state={"epoch": 1, "cursor": [3, 5]}
    )


def assert_equal_bits(one: object, other: object) -> None:
    if one is None or other is None:
        assert one is other
        return
    assert isinstance(one, np.ndarray) and isinstance(other, np.ndarray)
    assert one.dtype == other.dtype
    assert one.tobytes() == other.tobytes()


def test_what_comes_back_is_what_went_in(tmp_path: Path) -> None:
    path = tmp_path / "rollouts" / "step_000012.parquet"
    journal = example()
    write_journal(path, journal)
    back = read_journal(path)
    assert back is not None
    assert (back.step, back.dropped, back.state) == (12, journal.dropped, journal.state)
    assert len(back.groups) == len(journal.groups)
    for one, other in zip(journal.groups, back.groups, strict=True):
        assert (one.prompt_id, one.source, len(one.rollouts)) == (other.prompt_id, other.source, len(other.rollouts))
        for left, right in zip(one.rollouts, other.rollouts, strict=True):
            for name in (part.name for part in fields(Rollout)):  # a new one cannot be forgotten
                one_value, other_value = getattr(left, name), getattr(right, name)
                if isinstance(one_value, np.ndarray) or isinstance(other_value, np.ndarray):
                    assert_equal_bits(one_value, other_value)
                else:
                    assert (type(one_value), one_value) == (type(other_value), other_value), name
    assert [path.name for path in path.parent.iterdir()] == [path.name]  # no draft stays


def test_people_can_open_it_with_pandas(tmp_path: Path) -> None:
    import pandas as pd

    path = tmp_path / "step_000012.parquet"
    journal = example()
    write_journal(path, journal)
    table = pd.read_parquet(path)
    rollouts = [rollout for group in journal.groups for rollout in group.rollouts]
    assert len(table) == len(rollouts)
    assert list(table["token_ids"][0]) == list(rollouts[0].token_ids)
    assert table["reward"].tolist() == [rollout.reward for rollout in rollouts]


def test_a_step_without_groups(tmp_path: Path) -> None:
    path = tmp_path / "step.parquet"
    write_journal(path, Journal(step=1, groups=[], dropped=Dropped(reasons={"stale": 9})))
    back = read_journal(path)
    assert back is not None
    assert (back.groups, back.dropped.reasons) == ([], {"stale": 9})


def test_no_file_is_no_journal(tmp_path: Path) -> None:
    assert read_journal(tmp_path / "step.parquet") is None


def test_damage_counts_as_absent_and_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "step.parquet"
    write_journal(path, example())
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    torn = [whole[:size] for size in (0, 3, 100, len(whole) // 2, len(whole) - 1)]
    flipped = []
    for at in rng.integers(4, len(whole) - 8, 60):
        copy = bytearray(whole)
        copy[at] ^= 1 << int(rng.integers(8))
        flipped.append(bytes(copy))
    pristine = read_journal(path)
    assert pristine is not None
    num_found = 0
    for damaged in torn + flipped:
        path.write_bytes(damaged)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            back = read_journal(path)
        if back is None:
            num_found += 1
            assert str(path) in caplog.text
            continue
        # a bit that carries no content, such as the writer's name in the footer
        for one, other in zip(pristine.groups, back.groups, strict=True):
            for left, right in zip(one.rollouts, other.rollouts, strict=True):
                assert left.token_ids.tobytes() == right.token_ids.tobytes()
                assert (left.logprobs is None) == (right.logprobs is None)
                assert left.reward == right.reward
    assert num_found >= len(torn) + 50


@pytest.mark.parametrize("name", [part.name for part in fields(Rollout)])
def test_altered_values_in_a_sound_container_are_found(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The digest covers every field of every rollout, not only the container: one value of one rollout is changed."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "step.parquet"
    write_journal(path, example())
    table = pq.read_table(path)
    column = table.column(name)
    values = column.to_pylist()
    at = next(i for i, value in enumerate(values) if value is not None and i > 3)
    changes = {bool: lambda v: not v, str: lambda v: "length" if v == "stop" else "stop"}

    def changed(value: object) -> object:
        if isinstance(value, list):
            return [*value[:-1], changed(value[-1])]
        return changes.get(type(value), lambda v: v + 1)(value)

    for replacement in [changed(values[at])] + ([None] if None in values else []):
        altered = pa.array([*values[:at], replacement, *values[at + 1 :]], column.type)
        other = tmp_path / "altered.parquet"
        pq.write_table(table.set_column(table.column_names.index(name), name, altered), other)
        caplog.clear()
        assert read_journal(other) is None
        assert f"{other} is damaged and counts as absent: its digest does not match" in caplog.text


def test_a_journal_of_another_format_counts_as_absent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Such as one of an earlier version of the package: its rollouts know no temperature."""
    import pyarrow.parquet as pq

    path = tmp_path / "step.parquet"
    write_journal(path, example())
    table = pq.read_table(path)
    head = json.loads(table.schema.metadata[b"atropos_exp.head"])
    assert head["format"] == 3
    metadata = table.schema.metadata | {b"atropos_exp.head": json.dumps(head | {"format": 1}).encode()}
    older = table.drop_columns(["temperature", "supervised", "reference_logprobs"]).replace_schema_metadata(metadata)
    pq.write_table(older, path)
    assert read_journal(path) is None
    assert f"{path} counts as absent: it has format 1, this version reads 3" in caplog.text
