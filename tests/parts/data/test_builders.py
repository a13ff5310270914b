"""data_prep: what the builders write, and that they refuse to write what cannot be trained on."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from atropos_exp.errors import UserError
from data_prep.arithmetic import OPERATIONS, Arithmetic, is_held_out
from data_prep.assemble import DataSet, assemble
from data_prep.gsm8k import Gsm8k
from data_prep.hellaswag import Hellaswag
from data_prep.math import Math
from data_prep.reasoning_gym import TASKS, ReasoningGymTasks

Raw = dict[str, list[dict[str, Any]]]


def contents(table: pa.Table) -> list[str]:
    return [row[-1]["content"] for row in table.column("prompt").to_pylist()]


def truths(table: pa.Table) -> list[str]:
    return [row["ground_truth"] for row in table.column("reward_model").to_pylist()]


def local_copy(folder: Path, raw: Raw) -> str:
    folder.mkdir(parents=True)
    for split, rows in raw.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def check_schema(data: DataSet) -> None:
    for split, table in (("train", data.train), ("test", data.test)):
        assert table.column_names == ["data_source", "prompt", "ability", "reward_model", "extra_info"]
        assert table.schema.field("prompt").type.value_type.get_field_index("role") >= 0
        row = table.slice(0, 1).to_pylist()[0]
        assert row["reward_model"]["style"] == "rule" and isinstance(row["reward_model"]["ground_truth"], str)
        assert row["extra_info"]["index"] >= 0 and row["extra_info"]["split"] in (split, "validation")
    assert set(contents(data.train)).isdisjoint(contents(data.test))


def test_the_default_is_two_digit_addition() -> None:
    data = assemble(Arithmetic())
    check_schema(data)
    assert (data.train.num_rows, data.test.num_rows) == (6000, 256)
    problems = dict(
        zip(contents(data.train) + contents(data.test), truths(data.train) + truths(data.test), strict=True)
    )
    assert len(problems) == 6256
    for problem, answer in problems.items():
        left, right = problem.removesuffix("=").split("+")
        assert len(left) == len(right) == 2 and int(answer) == int(left) + int(right)


def test_no_choice_of_arguments_trains_on_what_another_holds_out() -> None:
    first, second = (assemble(Arithmetic(seed=seed, num_train=7000)) for seed in (1, 2))
    assert set(contents(first.train)).isdisjoint(contents(second.test))
    assert set(contents(second.train)).isdisjoint(contents(first.test))
    assert contents(first.test) != contents(second.test)
    held_out = [problem for problem in contents(first.train) + contents(first.test) if is_held_out(problem)]
    assert held_out == contents(first.test)


@pytest.mark.parametrize(
    ("arguments", "seen"),
    [
        ({"operations": "+-*", "digits": 1, "num_train": 250, "num_test": 10}, "+-*"),
        ({"operations": "-", "digits": 3, "num_train": 50, "num_test": 20}, "-"),
        ({"operations": "*+", "digits": 9, "num_train": 300, "num_test": 30}, "*+"),
    ],
)
def test_operations_and_digits(arguments: dict[str, Any], seen: str) -> None:
    data = assemble(Arithmetic(**arguments))
    assert (data.train.num_rows, data.test.num_rows) == (arguments["num_train"], arguments["num_test"])
    found = set()
    for problem, answer in zip(contents(data.train), truths(data.train), strict=True):
        (operation,) = set(problem) & set(OPERATIONS)
        left, right = problem.removesuffix("=").split(operation)
        assert len(left) == len(right) == arguments["digits"]
        assert int(answer) == eval(problem.removesuffix("="))
        found.add(operation)
    assert found == set(seen)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"operations": "+/"}, r"operations: got '\+/'"),
        ({"operations": ""}, "operations: got ''"),
        ({"digits": 0}, "digits: got 0, expected 1 to 9"),
        ({"num_train": 0}, "num_train: got 0, expected at least 1"),
        ({"num_train": 8000}, r"num_train: got 8000 \(\+ 256 held out\), but there are only 8100 different"),
        ({"seed": -1}, "seed: got -1, expected at least 0"),
    ],
)
def test_arithmetic_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Arithmetic(**arguments)


def test_one_in_sixteen_is_held_out_so_there_may_be_too_few() -> None:
    with pytest.raises(
        UserError, match=r"num_train: got 7800 .* of the 8100 different problems .* 7\d\d\d are for training"
    ):
        Arithmetic(num_train=7800).draft()


@pytest.mark.parametrize("make", [lambda seed: Arithmetic(seed=seed, num_train=300, num_test=20),
                                  lambda seed: ReasoningGymTasks(seed=seed, num_train=35, num_test=14)])  # fmt: skip
def test_equal_arguments_give_equal_rows(make: Callable[[int], Any]) -> None:
    first, again, other = assemble(make(4)), assemble(make(4)), assemble(make(5))
    assert first.train.equals(again.train) and first.test.equals(again.test)
    assert not first.train.equals(other.train) and not first.test.equals(other.test)


def test_reasoning_gym_tasks_in_equal_shares() -> None:
    data = assemble(ReasoningGymTasks(num_train=140, num_test=28))
    check_schema(data)
    assert len(TASKS) >= 5
    sources = data.train.column("data_source").to_pylist()
    assert set(sources) == {f"reasoning_gym/{task}" for task in TASKS}
    counts = Counter(sources)
    assert max(counts.values()) == 20 and data.train.num_rows >= 130  # few duplicates
    row = data.train.slice(0, 1).to_pylist()[0]
    entry = json.loads(row["extra_info"]["entry"])
    assert entry["answer"] == row["reward_model"]["ground_truth"]
    assert row["extra_info"]["task"] == entry["metadata"]["source_dataset"] == "chain_sum"
    assert "<answer>" in row["prompt"][0]["content"]


def test_an_unknown_task_is_told_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"no task 'chain_summ'; it has \d+\. Did you mean 'chain_sum'\?"):
        ReasoningGymTasks(tasks=["chain_summ"]).draft()


def test_options_of_a_task_set_how_hard_it_is() -> None:
    easy = {"chain_sum": {"max_terms": 2, "max_digits": 1}}
    rows = ReasoningGymTasks(tasks=["chain_sum", "syllogism"], options=easy, num_train=60, num_test=10).draft().train
    sums = [row["prompt"][0]["content"] for row in rows if row["extra_info"]["task"] == "chain_sum"]
    assert len(sums) == 30
    assert all(re.search(r"[ :]\d [+-] \d =", text) for text in sums)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gcd": {}}, r"options: gcd: not among the tasks chain_sum"),
        ({"chain_sum": {"digits": 1}}, r"options\.chain_sum\.digits: unknown; expected .*max_digits"),
        ({"chain_sum": {"max_terms": 1}}, r"options\.chain_sum: .* is refused by reasoning_gym: max_terms must be"),
        ({"chain_sum": {"max_terms": "x"}}, r"options\.chain_sum: .* is refused by reasoning_gym: "),
    ],
)
def test_wrong_options_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ReasoningGymTasks(tasks=["chain_sum"], options=options).draft()


def test_a_scorer_with_a_flaw_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """spell_backward of reasoning_gym 0.1.25 pays in full for some answers that only begin rightly."""
    monkeypatch.setattr(
        ReasoningGymTasks, "wrong", lambda self, row: f"<answer>{row['reward_model']['ground_truth']} wrong</answer>"
    )
    with pytest.raises(
        UserError, match=r"reward self-test failed: .*the wrong answer '<answer>\w+ wrong</answer>' scores 1"
    ):
        assemble(ReasoningGymTasks(tasks=["spell_backward"], num_train=80, num_test=10))


def test_rows_that_cannot_be_scored_are_dropped_up_to_a_limit(
    tmp_path: Path, raw_math: Raw, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = {
        "train": [*raw_math["train"], {**raw_math["train"][0], "problem": "Draw it.", "solution": "\\boxed{\\ldots}"}]
    }
    builder = Math(from_folder=local_copy(tmp_path / "copy", {**raw, "test": raw_math["test"]}))
    with pytest.raises(
        UserError, match=r"1 of 7 rows cannot be scored \(allowed: 2\.0%\): train row 5: .* gets no score"
    ):
        assemble(builder)
    monkeypatch.setattr(Math, "MAX_UNSCORABLE", 0.15)
    data = assemble(builder)
    assert data.counts["num_unscorable"] == 1
    assert truths(data.train) == [r"6\sqrt{2}", r"\frac{5}{4}", "49", "3"]


def test_gsm8k(tmp_path: Path, raw_gsm8k: Raw) -> None:
    data = assemble(Gsm8k(from_folder=local_copy(tmp_path / "copy", raw_gsm8k)))
    check_schema(data)
    assert truths(data.train) == [str(n * 301) for n in range(1, 9)]
    assert truths(data.test) == [str(2 * n + 40) for n in range(1, 5)]
    assert data.counts["num_drafted_train"] == 11
    assert {name: data.counts[name] for name in ("num_train_bad", "num_train_duplicates", "num_train_in_test")} == {
        "num_train_bad": 1,
        "num_train_duplicates": 1,
        "num_train_in_test": 1,
    }
    assert set(data.train.column("data_source").to_pylist()) == {"openai/gsm8k"}


def test_math(tmp_path: Path, raw_math: Raw) -> None:
    data = assemble(Math(from_folder=local_copy(tmp_path / "copy", raw_math)))
    check_schema(data)
    assert truths(data.train) == [r"6\sqrt{2}", r"\frac{5}{4}", "49", "3"]
    assert truths(data.test) == ["5", "x^2+2x+1"]
    assert data.counts["num_train_duplicates"] == 1
    assert data.train.column("extra_info").to_pylist()[0]["level"] == "Level 3"


def test_hellaswag(tmp_path: Path, raw_hellaswag: Raw) -> None:
    data = assemble(Hellaswag(from_folder=local_copy(tmp_path / "copy", raw_hellaswag)))
    check_schema(data)
    assert truths(data.train) == list("ABCDABCD") and truths(data.test) == list("ABCD")
    assert {row["split"] for row in data.test.column("extra_info").to_pylist()} == {"validation"}


def test_limits(tmp_path: Path, raw_gsm8k: Raw) -> None:
    data = assemble(Gsm8k(from_folder=local_copy(tmp_path / "copy", raw_gsm8k), max_train=3, max_test=2))
    assert (data.train.num_rows, data.test.num_rows) == (3, 2)


def test_another_data_set_in_the_folder(tmp_path: Path, raw_math: Raw, raw_gsm8k: Raw) -> None:
    with pytest.raises(UserError, match=r"copy, split train: has no column answer, question; its columns are problem"):
        assemble(Gsm8k(from_folder=local_copy(tmp_path / "copy", raw_math)))
    with pytest.raises(UserError, match=r"only: has train; expected the splits train and test"):
        assemble(Gsm8k(from_folder=local_copy(tmp_path / "only", {"train": raw_gsm8k["train"]})))
    with pytest.raises(UserError, match=r"data set folder gone does not exist"):
        assemble(Gsm8k(from_folder="gone"))


def test_a_planted_wrong_gold_fails_the_self_test(
    tmp_path: Path, raw_gsm8k: Raw, raw_math: Raw, raw_hellaswag: Raw, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [
        (Arithmetic(num_train=50, num_test=5), "7"),
        (ReasoningGymTasks(num_train=14, num_test=7), "7000"),
        (Gsm8k(from_folder=local_copy(tmp_path / "gsm8k", raw_gsm8k)), "7"),
        (Math(from_folder=local_copy(tmp_path / "math", raw_math)), "7"),
        (Hellaswag(from_folder=local_copy(tmp_path / "hellaswag", raw_hellaswag)), "A"),
    ]
    for builder, answer in cases:
        draft = builder.draft()
        draft.train[2]["reward_model"]["ground_truth"] = answer
        monkeypatch.setattr(type(builder), "draft", lambda self, draft=draft: draft)
        with pytest.raises(
            UserError, match=r"reward self-test failed: \d of \d+ rows cannot be scored .*: train row 2: the"
        ):
            assemble(builder)


def test_parquet_round_trip_keeps_every_value(tmp_path: Path, raw_hellaswag: Raw) -> None:
    data = assemble(Hellaswag(from_folder=local_copy(tmp_path / "copy", raw_hellaswag)))
    pq.write_table(data.train, tmp_path / "t.parquet")
    assert pq.read_table(tmp_path / "t.parquet").to_pylist() == data.train.to_pylist()
