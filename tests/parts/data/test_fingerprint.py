"""The content hash speaks of rows only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from atropos_exp.parts.data.fingerprint import content_hash

TABLE = pa.table(
    {
        "text": ["a", None, "", "bc"],
        "number": [1, None, 0, -4],
        "flag": [True, None, False, True],
        "real": [0.5, None, 0.0, 2.0],
        "nested": [[{"x": "1", "y": ["p", "q"]}], [], None, [{"x": None, "y": []}, {"x": "", "y": None}]],
    }
)


def test_it_does_not_depend_on_storage(tmp_path: Path) -> None:
    expected = content_hash(TABLE)
    for number, options in enumerate(
        ({"row_group_size": 1}, {"compression": "gzip", "use_dictionary": False}, {"version": "1.0"})
    ):
        path = tmp_path / f"{number}.parquet"
        pq.write_table(TABLE, path, **options)
        assert content_hash(pq.read_table(path)) == expected
    chunked = pa.concat_tables([TABLE.slice(0, 1), TABLE.slice(1, 2), TABLE.slice(3)])
    assert content_hash(chunked) == expected
    padded = pa.concat_tables([TABLE, TABLE]).combine_chunks().slice(4)  # a view that does not start at 0
    assert content_hash(padded) == expected
    assert content_hash(TABLE.select(list(reversed(TABLE.column_names)))) == expected
    encoded = TABLE.set_column(0, "text", TABLE.column("text").dictionary_encode())
    assert content_hash(encoded) == expected


@pytest.mark.parametrize(
    "change",
    [
        {"text": ["a", "", "", "bc"]},  # null and empty differ
        {"text": ["a", None, "b", "c"]},  # the same letters at another border
        {"number": [1, 0, 0, -4]},
        {"real": [0.5, None, 0.0, 2.5]},
        {"flag": [True, False, False, True]},
        {"nested": [[{"x": "1", "y": ["pq"]}], [], None, [{"x": None, "y": []}, {"x": "", "y": None}]]},
        {"nested": [[{"x": "1", "y": ["p", "q"]}], None, [], [{"x": None, "y": []}, {"x": "", "y": None}]]},
        {"nested": [[{"x": "1", "y": ["p", "q"]}], [], None, [{"x": None, "y": None}, {"x": "", "y": None}]]},
        {"extra": [None, None, None, None]},
    ],
)
def test_it_sees_every_change(change: dict[str, list[Any]]) -> None:
    columns = {name: TABLE.column(name) for name in TABLE.column_names}
    assert content_hash(pa.table({**columns, **change})) != content_hash(TABLE)


def test_order_and_number_of_rows_count() -> None:
    hashes = {content_hash(TABLE), content_hash(TABLE.take([1, 0, 2, 3])), content_hash(TABLE.slice(0, 3))}
    assert len(hashes) == 3
