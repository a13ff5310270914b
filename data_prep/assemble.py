"""From a draft to two tables: no prompt occurs twice or in both, and every right answer can be scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from atropos_exp.errors import UserError
from atropos_exp.parts.data.raw import VerlRow
from atropos_exp.parts.data.rows import check_rows
from data_prep.builder import Builder
from data_prep.selftest import self_test

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DataSet:
    """The tables of a data set, checked and ready to be written."""

    train: pa.Table
    test: pa.Table
    source: str
    counts: Mapping[str, int]  # rows kept and rows dropped, by reason


def assemble(builder: Builder) -> DataSet:
    """Draft rows, drop bad, repeated and overlapping ones, and self-test the reward. Raises UserError if it fails."""
    import pyarrow as pa

    draft = builder.draft()
    counts = {"num_drafted_train": len(draft.train), "num_drafted_test": len(draft.test), **draft.counts}
    train, counts["num_train_bad"], train_keys = _good(draft.train, "train")
    test, counts["num_test_bad"], test_keys = _good(draft.test, "test")
    test, test_keys, counts["num_test_duplicates"] = _first_of_each(test, test_keys, frozenset())
    held_out = frozenset(test_keys)
    overlapping = sum(key in held_out for key in train_keys)
    train, train_keys, dropped = _first_of_each(train, train_keys, held_out)
    counts |= {"num_train_in_test": overlapping, "num_train_duplicates": dropped - overlapping}
    for name, rows in (("train", train), ("test", test)):
        if not rows:
            raise UserError(f"{builder.NAME}: no usable {name} row from {draft.source}; {_shown(counts)}")

    report = self_test(builder, [*train, *test])
    unscorable = frozenset(report.unscorable)
    counts["num_unscorable"] = len(unscorable)
    train_kept = [row for index, row in enumerate(train) if index not in unscorable]
    test_kept = [row for index, row in enumerate(test, start=len(train)) if index not in unscorable]
    counts |= {"num_train": len(train_kept), "num_test": len(test_kept)}
    if not train_kept or not test_kept:
        raise UserError(f"{builder.NAME}: nothing is left after the reward self-test; {_shown(counts)}")
    together = pa.Table.from_pylist([*train_kept, *test_kept])  # one schema for both
    return DataSet(
        train=together.slice(0, len(train_kept)),
        test=together.slice(len(train_kept)),
        source=draft.source,
        counts=counts,
    )


def check_disjoint(train: pa.Table, test: pa.Table) -> None:
    """Raise UserError if a prompt is in both tables, by the text that the loader compares."""
    train_keys, test_keys = (
        check_rows(table, name, split=name)[0].table.column("key").to_pylist()
        for name, table in (("train", train), ("test", test))
    )
    both = sorted(set(train_keys) & set(test_keys))
    if both:
        raise UserError(f"{len(both)} prompts are in train and in test, such as {both[0]!r}")


def _good(rows: list[VerlRow], split: str) -> tuple[list[VerlRow], int, list[str]]:
    """The rows that the loader would accept, the number of others, and the keys of the good ones."""
    import pyarrow as pa

    if not rows:
        return [], 0, []
    checked, bad = check_rows(pa.Table.from_pylist(rows), split, split=split)
    good = checked.table.column("row").to_pylist()
    return [rows[index] for index in good], len(bad), checked.table.column("key").to_pylist()


def _first_of_each(rows: list[VerlRow], keys: list[str], taken: frozenset[str]) -> tuple[list[VerlRow], list[str], int]:
    """The first row of each key that is not `taken`, their keys, and the number of rows that are left out."""
    seen = set(taken)
    kept_rows, kept_keys = [], []
    for row, key in zip(rows, keys, strict=True):
        if key not in seen:
            seen.add(key)
            kept_rows.append(row)
            kept_keys.append(key)
    return kept_rows, kept_keys, len(rows) - len(kept_rows)


def _shown(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={count}" for name, count in counts.items())
