"""What the builders over Hugging Face data sets share: reading the raw splits and converting their rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from atropos_exp.errors import UserError
from atropos_exp.parts.data.hub import read_splits
from atropos_exp.parts.data.raw import RawFormat, VerlRow, verl_row
from data_prep.builder import Draft

if TYPE_CHECKING:
    import pyarrow as pa


def draft_from_hub(
    raw_format: RawFormat,
    *,
    dataset: str,
    config: str | None,
    revision: str | None,
    from_folder: str | None,
    test_splits: tuple[str, ...],
    max_train: int | None,
    max_test: int | None,
) -> Draft:
    """A draft with the raw split `train` to train on, and the first existing one of `test_splits` held out."""
    source = from_folder if from_folder is not None else dataset
    splits = read_splits(
        source,
        config,
        ["train", *test_splits],
        revision=None if from_folder else revision,
        is_folder=from_folder is not None,
    )
    test_split = next((split for split in test_splits if split in splits), None)
    if "train" not in splits or test_split is None:
        raise UserError(f"{source}: has {', '.join(splits)}; expected the splits train and {' or '.join(test_splits)}")
    at = f" at {revision}" if revision and not from_folder else ""
    return Draft(
        train=_rows(splits["train"], raw_format, "train", max_train, source),
        test=_rows(splits[test_split], raw_format, test_split, max_test, source),
        source=f"local copy {source}" if from_folder else f"{dataset}{f':{config}' if config else ''}{at}",
    )


def _rows(table: pa.Table, raw_format: RawFormat, split: str, limit: int | None, source: str) -> list[VerlRow]:
    missing = sorted(raw_format.columns - set(table.column_names))
    if missing:
        raise UserError(
            f"{source}, split {split}: has no column {', '.join(missing)}; its columns are "
            f"{', '.join(table.column_names)}; expected a copy of the {raw_format.name} data set with "
            f"{', '.join(sorted(raw_format.columns))}"
        )
    raws = (table if limit is None else table.slice(0, limit)).to_pylist()
    return [verl_row(raw, raw_format, split=split, index=index) for index, raw in enumerate(raws)]
