"""Reading Parquet files so that damage is reported with its row, before training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from atropos_exp.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_PIECE_BYTES = 16 * 2**20  # of Arrow memory, about, in one piece of a file
_PIECE_ROWS = 8192
_SAMPLE_ROWS = 16


def read_parquet(path: Path) -> pa.Table:
    """Read the whole file. Raises UserError with file, row and reason if any part cannot be read."""
    import pyarrow as pa

    return pa.concat_tables(parquet_pieces(path))


def num_parquet_rows(path: Path) -> int:
    """The number of rows that the footer gives. Raises UserError if it cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return int(pq.read_metadata(path).num_rows)
    except (pa.ArrowException, OSError) as error:
        _refuse(path, "", error)


def parquet_pieces(path: Path) -> Iterator[pa.Table]:
    """The file in pieces of a few megabytes, at least one. Raises UserError with file, row and reason if any part
    cannot be read.

    Page checksums are verified where the writer stored them (`data_prep` does), so flipped bits are found too.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    row, where = 0, ""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            if file.metadata.num_rows == 0:
                raise UserError(f"{path}: holds no rows; expected at least one")
            for group in range(file.num_row_groups):
                where = f" from row {row} on (row group {group} starts at row {row})"
                start = row
                for piece in _group_pieces(file, group):
                    yield piece
                    row += piece.num_rows
                    where = f" from row {row} on (row group {group} starts at row {start})"
    except (pa.ArrowException, OSError) as error:
        _refuse(path, where, error)


def _group_pieces(file: pq.ParquetFile, group: int) -> Iterator[pa.Table]:
    """One row group in pieces. The number of rows follows from the first rows' size: Arrow cannot make a piece with
    more than 2 GiB in one nested column, and a piece should be small anyway."""
    import pyarrow as pa

    num_rows = file.metadata.row_group(group).num_rows
    if num_rows == 0:
        return
    sample = next(iter(file.iter_batches(batch_size=_SAMPLE_ROWS, row_groups=[group])))
    size = max(1, min(_PIECE_ROWS, _PIECE_BYTES * sample.num_rows // max(1, sample.nbytes)))
    done = 0
    while done < num_rows:
        skip = done
        try:
            for batch in file.iter_batches(batch_size=size, row_groups=[group]):
                fresh = batch.slice(min(skip, batch.num_rows))
                skip -= batch.num_rows - fresh.num_rows
                if fresh.num_rows:
                    yield pa.Table.from_batches([fresh])
                    done += fresh.num_rows
        except pa.ArrowNotImplementedError:  # later rows are larger
            if size == 1:
                raise
            size = max(1, size // 8)


def _refuse(path: Path, where: str, error: Exception) -> NoReturn:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise UserError(
        f"{path}: cannot be read as Parquet{where}: {reason}; "
        "fetch or build the file again (python -m data_prep.<builder> --help)"
    ) from error


def write_parquet(table: pa.Table, path: Path) -> None:
    """Write `table` with checksums. Equal tables give equal bytes under one version of pyarrow."""
    import pyarrow.parquet as pq

    pq.write_table(table, path, compression="zstd", write_page_checksum=True, row_group_size=16384)
