"""Reading Parquet files so that damage is reported with its row, before training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from atropos_exp.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa


def read_parquet(path: Path) -> pa.Table:
    """Read the whole file. Raises UserError with file, row and reason if any part cannot be read.

    Page checksums are verified where the writer stored them (`data_prep` does), so flipped bits are found too.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            table = file.read()
    except (pa.ArrowException, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{path}: cannot be read as Parquet{_damaged_row(path)}: {reason}; "
            "fetch or build the file again (python -m data_prep.<builder> --help)"
        ) from error
    if table.num_rows == 0:
        raise UserError(f"{path}: holds no rows; expected at least one")
    return table


def _damaged_row(path: Path) -> str:
    """The clause " from row N on (...)", or "" if the footer is damaged, so that no row can be named."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError):
        return ""  # the footer itself is damaged or cut off
    row = 0
    with file:
        for group in range(file.num_row_groups):
            start = row
            try:
                for batch in file.iter_batches(batch_size=256, row_groups=[group]):
                    row += batch.num_rows
            except (pa.ArrowException, OSError):
                return f" from row {row} on (row group {group} starts at row {start})"
    return ""


def write_parquet(table: pa.Table, path: Path) -> None:
    """Write `table` with checksums. Equal tables give equal bytes under one version of pyarrow."""
    import pyarrow.parquet as pq

    pq.write_table(table, path, compression="zstd", write_page_checksum=True, row_group_size=16384)
