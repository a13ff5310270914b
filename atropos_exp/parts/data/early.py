"""What shows of parquet files before any row is read: that they are parquet, hold rows, and have verl's columns."""

from collections.abc import Iterable
from pathlib import Path

from atropos_exp.errors import UserError
from atropos_exp.parts.data.paths import files_of
from atropos_exp.parts.data.schema import check_columns


def problems_of(named: Iterable[tuple[str, str]]) -> list[str]:
    """One line per file that cannot be used. `named`: pairs of a setting and the path or glob in it."""
    problems = []
    for key, name in named:
        for path in files_of(name, key=key):
            try:
                _check(path)
            except UserError as error:
                problems.append(f"{key}: {error}")
    return problems


def _check(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            num_rows, schema = file.metadata.num_rows, file.schema_arrow
    except (pa.ArrowException, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: cannot be read as Parquet: {reason}") from error
    if not num_rows:
        raise UserError(f"{path}: holds no rows; expected at least one")
    check_columns(schema, str(path))
