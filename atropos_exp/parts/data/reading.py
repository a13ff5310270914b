"""What one entry of the configuration names: files or data sets, each read piece by piece when its rows are wanted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from atropos_exp.parts.data.fingerprint import content_hash, files_hash
from atropos_exp.parts.data.hub import Opened, in_verls_schema, local_files, read_table, read_verl
from atropos_exp.parts.data.parquet import num_parquet_rows, parquet_pieces
from atropos_exp.parts.data.paths import files_of
from atropos_exp.parts.data.settings import Entry


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Readable:
    """One file or data set."""

    name: str  # as messages call it
    split: str  # for prompt ids
    identity: str  # equal: the same bytes or content, read alike
    num_rows: int | None  # if known
    open: Callable[[], Opened]


def readable(entry: Entry) -> list[Readable]:
    """What `entry` names, in order. Raises UserError."""
    return [_dataset(entry)] if entry.is_hub else [_parquet(path) for path in files_of(entry.name, key=entry.key)]


def _parquet(path: Path) -> Readable:
    return Readable(
        name=str(path),
        split=path.stem,
        num_rows=num_parquet_rows(path),
        identity=f"parquet {files_hash([path])} {path.stem}",
        open=lambda: Opened(pieces=parquet_pieces(path)),
    )


def _dataset(entry: Entry) -> Readable:
    """A local copy is known by its files' bytes, one of the hub by its rows, which its library maps to memory."""
    name, split = entry.name, entry.split
    files = local_files(name, default_split=split)
    table = None if files is not None else read_table(name, default_split=split)
    return Readable(
        name=name,
        split=split,
        num_rows=None if table is None else table.num_rows,
        identity=f"data set {files_hash(files) if files is not None else content_hash(table)} {name} {split}",
        open=lambda: (
            read_verl(name, default_split=split) if table is None else in_verls_schema(table, name, default_split=split)
        ),
    )


@cache
def code_hash() -> str:
    """The hash of the code that reads rows: what it made before a change is not used after it."""
    return files_hash(sorted(Path(__file__).parent.glob("*.py")))
