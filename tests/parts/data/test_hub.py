"""Raw data sets in their real columns, from local copies."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from atropos_exp.errors import UserError
from atropos_exp.parts.data.hub import DatasetName, read_verl
from atropos_exp.parts.data.raw import HELLASWAG, boxed_answer, gsm8k_answer, recognise, verl_row

Make = Callable[..., Any]
Raw = dict[str, list[dict[str, Any]]]


def save_to_disk(folder: Path, raw: Raw) -> Path:
    from datasets import Dataset, DatasetDict

    DatasetDict({split: Dataset.from_list(rows) for split, rows in raw.items()}).save_to_disk(str(folder))
    return folder


def save_parquet(folder: Path, raw: Raw) -> Path:
    """As in a clone of the hub's repository."""
    for split, rows in raw.items():
        (folder / "main").mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), folder / "main" / f"{split}-00000-of-00001.parquet")
    return folder


def save_jsonl(folder: Path, raw: Raw) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in raw.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def save_arrow(folder: Path, raw: Raw) -> Path:
    for split, rows in raw.items():
        table = pa.Table.from_pylist(rows)
        (folder / split).mkdir(parents=True, exist_ok=True)
        with pa.ipc.new_stream(str(folder / split / "data-00000-of-00001.arrow"), table.schema) as writer:
            writer.write_table(table)
    return folder


@pytest.mark.parametrize("save", [save_to_disk, save_parquet, save_jsonl, save_arrow])
def test_every_kind_of_local_copy_gives_the_same_prompts(
    tmp_path: Path, raw_gsm8k: Raw, open_loader: Make, save: Callable[[Path, Raw], Path]
) -> None:
    folder = save(tmp_path / "gsm8k", raw_gsm8k)
    name = f"{folder}:main" if save is save_parquet else str(folder)
    loader = open_loader(hf_datasets=name, eval_paths=f"{name}@test", max_bad_fraction=0.1)
    assert loader.counts.total.num_prompts == 9  # eight and one of them twice
    assert loader.counts.total.num_quarantined == 1 and loader.counts.total.num_eval_overlap == 1
    prompts = {prompt.prompt_id: prompt for prompt in loader.take(9)}
    third = prompts["openai/gsm8k/train/2"]
    assert third.ground_truth == "903" and third.ability == "math" and third.data_source == "openai/gsm8k"
    assert third.text.startswith("Ann has 3 pears and buys 900 more. How many has she?\n") and "####" in third.text
    assert third.extra_info["answer"].endswith("#### 903")
    assert prompts["openai/gsm8k/train/3"].ground_truth == "1204"  # "1,204" there
    (line,) = (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["row"] == 10 and "ground_truth is missing" in line


def test_a_single_saved_split_is_train(tmp_path: Path, raw_gsm8k: Raw, open_loader: Make) -> None:
    from datasets import Dataset

    Dataset.from_list(raw_gsm8k["train"][:3]).save_to_disk(str(tmp_path / "one"))
    assert open_loader(hf_datasets=str(tmp_path / "one")).counts.total.num_prompts == 3


def test_a_local_copy_in_verls_schema_is_taken_as_it_is(tmp_path: Path, rows_of: Make, open_loader: Make) -> None:
    folder = save_to_disk(tmp_path / "own", {"train": rows_of(["a", "b"]), "test": rows_of(["c"], split="test")})
    loader = open_loader(hf_datasets=[str(folder), f"{folder}@test"])
    assert {prompt.prompt_id for prompt in loader.take(3)} == {"toy/train/0", "toy/train/1", "toy/test/0"}


def test_a_changed_data_set_is_noticed_on_resume(tmp_path: Path, raw_gsm8k: Raw, open_loader: Make) -> None:
    folder = save_jsonl(tmp_path / "copy", {"train": raw_gsm8k["train"][:8]})
    state = open_loader(hf_datasets=str(folder)).state()
    open_loader(hf_datasets=str(folder)).restore(state)
    save_jsonl(folder, {"train": raw_gsm8k["train"][:7]})
    with pytest.raises(UserError, match=r"copy changed since the checkpoint: .*\(8 rows\).*\(7 rows\)"):
        open_loader(hf_datasets=str(folder)).restore(state)


def test_hellaswag_rows(raw_hellaswag: Raw) -> None:
    row = verl_row(raw_hellaswag["train"][6], HELLASWAG, split="train", index=6)
    assert row["prompt"][0]["content"].startswith(
        "Making tea: How to make tea. Boil water Fill kettle number 6. Then she\n\n"
        "A. heats the train kettle.\nB. eats the train kettle.\nC. paints the train kettle.\nD. sells the train kettle."
    )
    assert row["reward_model"]["ground_truth"] == "C"
    unlabelled = verl_row(raw_hellaswag["test"][0], HELLASWAG, split="test", index=0)
    assert unlabelled["reward_model"]["ground_truth"] is None


def test_formats_are_recognised_by_their_columns(raw_gsm8k: Raw, raw_math: Raw, raw_hellaswag: Raw) -> None:
    for name, raw in (("gsm8k", raw_gsm8k), ("math", raw_math), ("hellaswag", raw_hellaswag)):
        found = recognise(raw["train"][0])
        assert found is not None and found.name == name
    math_500 = recognise(["problem", "solution", "answer", "subject", "level", "unique_id"])
    assert math_500 is not None and math_500.name == "math"
    assert recognise(["text"]) is None


def test_unknown_columns_and_splits(tmp_path: Path) -> None:
    folder = save_jsonl(tmp_path / "texts", {"train": [{"text": "once upon a time"}]})
    with pytest.raises(
        UserError, match=r"its columns text are not known; expected verl's schema or hellaswag: .*gsm8k: "
    ):
        read_verl(str(folder), default_split="train")
    with pytest.raises(UserError, match=r"found no file of split test;.*data files there: train\.jsonl"):
        read_verl(f"{folder}@test", default_split="train")
    with pytest.raises(UserError, match=r"data set folder .*/nothing does not exist"):
        read_verl(str(tmp_path / "nothing"), default_split="train")


def test_a_damaged_local_copy(tmp_path: Path, raw_gsm8k: Raw) -> None:
    folder = save_parquet(tmp_path / "copy", raw_gsm8k)
    path = folder / "main" / "train-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"data set .*copy:main cannot be loaded: .*use a local copy"):
        read_verl(f"{folder}:main", default_split="train")


def test_an_unreachable_hub_is_one_clear_message() -> None:
    """HF_HUB_OFFLINE is set for all tests."""
    with pytest.raises(
        UserError, match=r"data set nobody/nothing:main cannot be loaded: .*check the id and the network"
    ):
        read_verl("nobody/nothing:main", default_split="train")


def test_names() -> None:
    name = DatasetName.parse("openai/gsm8k:main@test")
    assert (name.source, name.config, name.split) == ("openai/gsm8k", "main", "test")
    assert DatasetName.parse("Rowan/hellaswag") == DatasetName(source="Rowan/hellaswag", config=None, split=None)
    for wrong in ("", ":main", "a/b@", "a/b:"):
        with pytest.raises(UserError, match=r"expected id\[:config\]\[@split\]"):
            DatasetName.parse(wrong)


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("so\n#### 42", "42"),
        ("#### 1,234,567", "1234567"),
        ("#### -3.50", "-3.50"),
        ("#### $18", "18"),
        ("#### 7.", "7"),
        ("first #### 1 then #### 2", "2"),
        ("no answer", None),
        ("####", None),
        ("#### Paris\nof course", "Paris"),
        ("#### 3/4", "3/4"),
        ("#### 1 1/2", "1 1/2"),
        ("#### 3\\sqrt{13}", "3\\sqrt{13}"),
        ("#### 2x+1", "2x+1"),
        ("#### 10:30", "10:30"),
        ("#### 4, 5", "4, 5"),
        ("#### 1,2,3", "1,2,3"),
        ("#### 1e6", "1000000"),
        ("#### 1 000", "1000"),
        ("#### -$1,234.50", "-1234.50"),
        ("#### x = 5", "5"),
    ],
)
def test_gsm8k_answers(solution: str, answer: str | None) -> None:
    assert gsm8k_answer(solution) == answer


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"it is $\boxed{5}$.", "5"),
        (r"\boxed{1} and then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"so \fbox{x^{2}}.", "x^{2}"),
        (r"so $x=\boxed 3$.", "3"),
        (r"\boxed{ \text{(A)} }", r"\text{(A)}"),
        (r"\boxed{unclosed", None),
        ("nothing", None),
        (r"\boxed{}", None),
    ],
)
def test_boxed_answers(solution: str, answer: str | None) -> None:
    assert boxed_answer(solution) == answer
