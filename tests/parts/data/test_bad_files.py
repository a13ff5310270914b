"""Data that cannot be trained on stops the run before it starts, with file, row and reason."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from atropos_exp.errors import UserError
from atropos_exp.parts.data.parquet import read_parquet, write_parquet

Make = Callable[..., Any]


def test_a_truncated_file(tmp_path: Path, rows_of: Make, write_rows: Make, open_loader: Make) -> None:
    path = write_rows(tmp_path / "cut.parquet", rows_of(["a", "b"]))
    whole = path.read_bytes()
    for length in (0, 3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"cut\.parquet: cannot be read as Parquet.*build the file again"):
            open_loader(parquet_paths=path)


def test_flipped_bits_are_found_and_placed(tmp_path: Path, rows_of: Make) -> None:
    rows = rows_of([f"a rather different text, number {number * 7919}" for number in range(1000)])
    path = tmp_path / "flipped.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=250, write_page_checksum=True)
    metadata = pq.ParquetFile(path).metadata
    column = metadata.row_group(2).column(1)  # the prompts of rows 500 to 749
    data = bytearray(path.read_bytes())
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"flipped\.parquet: cannot be read as Parquet from row 500 on \(row group 2"):
        read_parquet(path)


def test_our_own_files_carry_checksums(tmp_path: Path, rows_of: Make) -> None:
    path = tmp_path / "ours.parquet"
    write_parquet(pa.Table.from_pylist(rows_of([f"text {number * 7919}" for number in range(500)])), path)
    column = pq.ParquetFile(path).metadata.row_group(0).column(1)
    data = bytearray(path.read_bytes())
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 0x01
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"cannot be read as Parquet.*CRC"):
        read_parquet(path)


def test_not_parquet_at_all(tmp_path: Path, open_loader: Make) -> None:
    path = tmp_path / "rows.parquet"
    path.write_text('{"prompt": "hello"}\n' * 10)
    with pytest.raises(UserError, match=r"rows\.parquet: cannot be read as Parquet"):
        open_loader(parquet_paths=path)


def test_no_rows(tmp_path: Path, rows_of: Make, open_loader: Make) -> None:
    path = tmp_path / "empty.parquet"
    pq.write_table(pa.Table.from_pylist(rows_of(["a"])).slice(0, 0), path)
    with pytest.raises(UserError, match=r"empty\.parquet: holds no rows"):
        open_loader(parquet_paths=path)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"question": ["a"], "answer": ["b"]},
            "column data_source is missing; column prompt is missing; column reward_model",
        ),
        (
            {"data_source": ["x"], "prompt": ["text"], "reward_model": [{"ground_truth": "1"}]},
            "column prompt is string",
        ),
        (
            {
                "data_source": ["x"],
                "prompt": [[{"role": "user", "text": "t"}]],
                "reward_model": [{"ground_truth": "1"}],
            },
            "column prompt is list<",
        ),
        (
            {"data_source": ["x"], "prompt": [[{"role": "user", "content": "t"}]], "reward_model": [{"style": "rule"}]},
            "column reward_model is struct<style",
        ),
        (
            {
                "data_source": ["x"],
                "prompt": [[{"role": "user", "content": "t"}]],
                "reward_model": [{"ground_truth": [datetime.date(2024, 1, 2)]}],
            },
            "reward_model.ground_truth is list<.*expected text, a number, or a list or struct of them",
        ),
        (
            {
                "data_source": ["x"],
                "prompt": [[{"role": "user", "content": "t"}]],
                "reward_model": [{"ground_truth": "a"}],
                "extra_info": ["text"],
            },
            "column extra_info is string; expected a struct",
        ),
    ],
)
def test_wrong_schema(tmp_path: Path, open_loader: Make, columns: dict[str, Any], message: str) -> None:
    path = tmp_path / "wrong.parquet"
    pq.write_table(pa.table(columns), path)
    with pytest.raises(UserError, match=rf"wrong\.parquet: wrong schema: {message}.*expected data_source: string"):
        open_loader(parquet_paths=path)


def test_whole_number_ground_truths_are_written_out(
    tmp_path: Path, rows_of: Make, write_rows: Make, open_loader: Make
) -> None:
    rows = rows_of(["6*7="])
    rows[0]["reward_model"]["ground_truth"] = 42
    (prompt,) = open_loader(parquet_paths=write_rows(tmp_path / "int.parquet", rows)).take(1)
    assert prompt.ground_truth == "42"


def broken_rows(rows_of: Make) -> list[dict[str, Any]]:
    """Fourteen good rows, and at 1, 3, 4, 6, 8, 9 one of each kind of bad ones."""
    rows: list[dict[str, Any]] = rows_of([f"text {number}" for number in range(20)])
    rows[1]["prompt"] = None
    rows[3]["prompt"] = [{"role": "user", "content": "  \n"}]
    rows[4]["reward_model"]["ground_truth"] = None
    rows[6]["prompt"] = [{"role": "robot", "content": "hi"}, {"role": "user", "content": "there"}]
    rows[8]["prompt"].append({"role": "assistant", "content": "sure"})
    rows[9]["data_source"] = None
    return rows


REASONS = {
    1: "prompt has no messages",
    3: "a message has no content",
    4: "reward_model.ground_truth is missing",
    6: "a message's role is none of system, user, assistant, tool",
    8: "the last message is not the user's",
    9: "data_source is missing",
}


def test_bad_rows_are_quarantined_and_counted(
    tmp_path: Path, rows_of: Make, write_rows: Make, open_loader: Make
) -> None:
    path = write_rows(tmp_path / "bad.parquet", broken_rows(rows_of), row_group_size=7)
    for _ in range(2):  # a resumed run writes the same list, not a second one
        loader = open_loader(parquet_paths=path, max_bad_fraction=0.3)  # six of twenty
    assert (loader.counts.total.num_prompts, loader.counts.total.num_quarantined) == (14, 6)
    expected = {f"text {number}" for number in range(20)} - {f"text {number}" for number in REASONS}
    assert {prompt.text for prompt in loader.take(14)} == expected
    lines = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert {line["row"]: line["reason"] for line in lines} == REASONS
    assert {line["file"] for line in lines} == {str(path)} and len(lines) == 6
    assert lines[4]["content"]["prompt"][1] == {"role": "assistant", "content": "sure"}


def test_each_row_keeps_its_own_extra_info(tmp_path: Path, rows_of: Make, write_rows: Make, open_loader: Make) -> None:
    """Rows left out for any reason must not shift what stands beside the others."""
    rows = broken_rows(rows_of)
    for number, row in enumerate(rows):
        row["extra_info"]["note"] = f"note {number}"
    first = write_rows(tmp_path / "first.parquet", rows)
    second = write_rows(
        tmp_path / "second.parquet", [rows[5], rows[15]]
    )  # two files of one source; overlap of text is fine
    test = write_rows(tmp_path / "eval.parquet", rows_of(["text 2", "text 12"], split="test"))
    loader = open_loader(parquet_paths=str(tmp_path / "[fs]*.parquet"), eval_paths=test, max_bad_fraction=0.5)
    assert first.name < second.name
    prompts = loader.take(14)
    assert len({prompt.prompt_id for prompt in prompts}) == 14
    for prompt in prompts:
        assert prompt.extra_info["note"] == prompt.text.replace("text", "note")
        assert prompt.ground_truth == prompt.text[::-1]


def test_too_many_bad_rows_stop_the_run(tmp_path: Path, rows_of: Make, write_rows: Make, open_loader: Make) -> None:
    path = write_rows(tmp_path / "bad.parquet", broken_rows(rows_of))
    with pytest.raises(
        UserError,
        match=r"6 of 20 rows of .*bad\.parquet are bad, more than the 5 that data\.max_bad_fraction=0\.29 allows: "
        r".*bad\.parquet row 1: prompt has no messages; .*bad\.parquet row 3: .* and 3 more",
    ):
        open_loader(parquet_paths=path, max_bad_fraction=0.29)
    assert len((tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()) == 6  # all of them can be looked at


def test_bad_eval_rows_count_too(
    tmp_path: Path, rows_of: Make, write_rows: Make, open_loader: Make, settings: Make, tokenizer: Any
) -> None:
    train = write_rows(tmp_path / "train.parquet", rows_of(["a", "b"]))
    test = write_rows(tmp_path / "test.parquet", broken_rows(rows_of))
    with pytest.raises(UserError, match=r"6 of 20 rows of .*test\.parquet are bad"):
        open_loader(parquet_paths=train, eval_paths=test)
    with pytest.raises(UserError, match=r"6 of 20 rows of .*test\.parquet are bad"):
        settings(parquet_paths=train, eval_paths=test).eval_prompts(tokenizer, num_prompts=3, max_prompt_length=99)
    assert open_loader(parquet_paths=train, eval_paths=test, max_bad_fraction=0.5).counts.num_eval_quarantined == 6


def test_text_that_is_no_utf8_is_a_bad_row(tmp_path: Path, rows_of: Make, open_loader: Make) -> None:
    table = pa.Table.from_pylist(rows_of(["fine", "broken", "fine too"]))
    raw = pa.array([b"answer", b"\xff\xfe", b"answer"], pa.binary()).view(pa.string())
    model = pa.StructArray.from_arrays([pa.array(["rule"] * 3), raw], ["style", "ground_truth"])
    path = tmp_path / "latin.parquet"
    pq.write_table(table.set_column(table.schema.get_field_index("reward_model"), "reward_model", model), path)
    loader = open_loader(parquet_paths=path, max_bad_fraction=0.5)
    assert {prompt.text for prompt in loader.take(2)} == {"fine", "fine too"}
    (line,) = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert line["row"] == 1 and "UTF" in line["reason"]
