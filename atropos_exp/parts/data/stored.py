"""The checked rows of one file on disk: what filters need as arrays in mapped memory, all else read row by row."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from atropos_exp.interfaces import JSON
from atropos_exp.parts.data.cache import Cache
from atropos_exp.parts.data.fingerprint import ContentHasher, text_hashes
from atropos_exp.parts.data.progress import Progress
from atropos_exp.parts.data.reading import Readable, code_hash
from atropos_exp.parts.data.rows import BadRow, check_rows
from atropos_exp.parts.data.unseen import unused_columns

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

_ROWS, _BAD = "rows.arrow", "bad.jsonl"
_BATCH_BYTES, _BATCH_ROWS = 2**19, 1024  # that are decompressed to read one row


@dataclass(frozen=True, kw_only=True, slots=True)
class FileStamp:
    """A file as a resumed run must find it again."""

    name: str
    content_hash: str
    num_rows: int


class StoredRows:
    """The good rows of one file, 0 to len - 1, and its bad ones."""

    def __init__(self, name: str, folder: Path, about: JSON) -> None:
        self.folder = folder
        self.name = name
        self.stamp = FileStamp(name=name, content_hash=about["content_hash"], num_rows=about["num_rows"])
        self.num_bad: int = about["num_bad"]
        self.notes: tuple[str, ...] = tuple(about["notes"])
        self.abilities: tuple[str, ...] = tuple(about["abilities"])  # by number
        self.is_structured: bool = about["is_structured"]  # ground truths are JSON
        self.keys: NDArray[np.uint64] = _load(folder, "keys")  # hash of each normalised text
        self.id_hashes: NDArray[np.uint64] = _load(folder, "ids")  # hash of each prompt id
        self.ability: NDArray[np.int32] = _load(folder, "ability")  # the number of each row's
        self._starts: NDArray[np.int64] = _load(folder, "starts")  # the first row of each batch on disk

    def __len__(self) -> int:
        return len(self.keys)

    def row(self, index: int) -> dict[str, Any]:
        """The columns of one row: prompt, prompt_id, data_source, text, ground_truth, ability, extra_info."""
        batch = int(np.searchsorted(self._starts, index, side="right")) - 1
        one = self._reader.get_batch(batch).slice(index - int(self._starts[batch]), 1)
        row: dict[str, Any] = one.to_pylist()[0]
        return row

    def prompts(self, start: int, size: int) -> Iterator[pa.Array]:
        """The messages of `size` rows from `start` on, in pieces."""
        batch = int(np.searchsorted(self._starts, start, side="right")) - 1
        end = start + size
        while start < end:
            first = int(self._starts[batch])
            column = self._reader.get_batch(batch).column("prompt")
            yield column.slice(start - first, end - start)
            start, batch = first + len(column), batch + 1

    def bad_rows(self) -> Iterator[BadRow]:
        """The rows that are left out."""
        with open(self.folder / _BAD, encoding="utf-8") as file:
            for line in file:
                yield BadRow(file=self.name, **json.loads(line))

    @cached_property
    def _reader(self) -> pa.RecordBatchFileReader:
        import pyarrow as pa

        return pa.ipc.open_file(pa.memory_map(str(self.folder / _ROWS)))


def stored_rows(source: Readable, cache: Cache) -> StoredRows:
    """The rows of `source`, read and checked unless the cache has them. Raises UserError with file, row and reason."""
    import xxhash

    identity = xxhash.xxh3_64_hexdigest(f"{source.identity} {code_hash()}".encode())
    folder, about = cache.sealed(f"rows-{identity}", lambda draft: _write(source, draft))
    return StoredRows(source.name, folder, about)


def _write(source: Readable, draft: Path) -> JSON:
    with open(draft / _BAD, "w", encoding="utf-8", errors="replace") as bad, _Writer(draft / _ROWS) as writer:
        return _write_rows(source, draft, writer, bad)


def _write_rows(source: Readable, draft: Path, writer: _Writer, bad_file: IO[str]) -> JSON:
    import pyarrow.compute as pc

    opened, hasher = source.open(), ContentHasher()
    keys, ids, ability = [], [], []
    numbers: dict[str, int] = {}
    num_rows = num_bad = 0
    is_structured = False
    unused: list[str] = []
    progress = Progress("read", f"rows of {source.name}", source.num_rows)
    for piece in opened.pieces:
        hasher.update(piece)
        rows, bad = check_rows(piece, source.name, split=source.split, first_row=num_rows, no_truth=opened.no_truth)
        for one in bad:
            line = {key: value for key, value in asdict(one).items() if key != "file"}
            bad_file.write(json.dumps(line, ensure_ascii=False, default=_shown) + "\n")
        num_rows, num_bad = num_rows + piece.num_rows, num_bad + len(bad)
        is_structured |= rows.is_structured
        unused = unused_columns(piece.schema)
        table = rows.table
        keys.append(text_hashes(table.column("key")))
        ids.append(text_hashes(table.column("prompt_id")))
        for name in pc.unique(table.column("ability")).to_pylist():
            numbers.setdefault(name, len(numbers))
        ability.append(np.array([numbers[name] for name in table.column("ability").to_pylist()], np.int32))
        table = table.drop_columns(["key", "row"])
        writer.write(table if rows.extra_info is None else table.append_column("extra_info", rows.extra_info))
        progress.at(num_rows)
    notes = [opened.note] if opened.note is not None else []
    notes += [f"{source.name}: columns that are not used: {', '.join(unused)}"] if unused else []
    for name, values in (("keys", keys), ("ids", ids), ("ability", ability)):
        np.save(draft / f"{name}.npy", np.concatenate(values))
    np.save(draft / "starts.npy", np.array(writer.starts, np.int64))
    return {
        "content_hash": hasher.hexdigest(),
        "num_rows": num_rows,
        "num_bad": num_bad,
        "notes": notes,
        "abilities": list(numbers),
        "is_structured": is_structured,
    }


class _Writer:
    """Writes tables as small compressed batches, so that one row can be read without the others."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer: pa.RecordBatchFileWriter | None = None
        self._num_rows = 0
        self.starts: list[int] = []

    def write(self, table: pa.Table) -> None:
        import pyarrow as pa

        if self._writer is None:
            options = pa.ipc.IpcWriteOptions(compression="lz4")
            self._schema = table.schema
            self._writer = pa.ipc.new_file(str(self._path), table.schema, options=options)
        table = table.cast(self._schema)  # rows of a data set without types may differ: null, then text
        size = max(1, min(_BATCH_ROWS, _BATCH_BYTES * table.num_rows // max(1, table.nbytes)))
        for start in range(0, table.num_rows, size):
            batch = table.slice(start, size).combine_chunks().to_batches()[0]
            self._writer.write_batch(batch)
            self.starts.append(self._num_rows)
            self._num_rows += batch.num_rows

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()


def _load(folder: Path, name: str) -> NDArray[Any]:
    array: NDArray[Any] = np.load(folder / f"{name}.npy", mmap_mode="r")
    return array


def _shown(value: object) -> str:
    return f"<{len(value)} bytes>" if isinstance(value, bytes) else repr(value)
