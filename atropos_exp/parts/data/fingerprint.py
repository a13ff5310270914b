"""Hashes of a table's content, independent of how a file stores it, and of files.

Equal rows give equal hashes whatever the row groups, compression, chunking, dictionary encoding or writer version.
It works on whole columns, about a gigabyte a second.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray


def content_hash(table: pa.Table) -> str:
    """xxh3-128 over the column names, types, nulls and values of `table`, rows in order, columns by name."""
    hasher = ContentHasher()
    hasher.update(table)
    return hasher.hexdigest()


def files_hash(paths: Iterable[Path]) -> str:
    """xxh3-128 over the bytes of files, in order."""
    import xxhash

    together = xxhash.xxh3_128()
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            together.update(hashlib.file_digest(file, xxhash.xxh3_128).digest())
    return together.hexdigest()


def text_hashes(texts: pa.ChunkedArray) -> NDArray[np.uint64]:
    """xxh3-64 [N] of each text."""
    import pyarrow as pa
    import xxhash

    hashes = (xxhash.xxh3_64_intdigest(text) for text in texts.cast(pa.binary()).to_pylist())
    return np.fromiter(hashes, np.uint64, count=len(texts))


class ContentHasher:
    """`content_hash` of a table that comes in pieces. Each leaf of the schema has a stream of its own, so that the
    result does not depend on where the pieces are cut."""

    def __init__(self) -> None:
        self._streams: dict[tuple[str, ...], Any] = {}
        self._num_rows = 0

    def update(self, table: pa.Table) -> None:
        """Add the rows of `table`, which has the same columns as those before it."""
        self._num_rows += table.num_rows
        for name in table.column_names:
            for chunk in table.column(name).chunks:
                self._feed((name,), chunk)

    def hexdigest(self) -> str:
        """The hash of all rows so far."""
        import xxhash

        leaves = [[*path, stream.hexdigest()] for path, stream in sorted(self._streams.items())]
        return xxhash.xxh3_128(f"rows={self._num_rows}{leaves!r}".encode()).hexdigest()

    def _add(self, path: tuple[str, ...], *values: Any) -> None:
        import xxhash

        if path not in self._streams:
            self._streams[path] = xxhash.xxh3_128()
        for value in values:
            self._streams[path].update(value)

    def _feed(self, path: tuple[str, ...], array: pa.Array) -> None:
        import pyarrow as pa
        import pyarrow.compute as pc

        kind = array.type
        if pa.types.is_dictionary(kind):
            self._feed(path, array.dictionary_decode())
            return
        self._add((*path, "null"), np.asarray(pc.is_null(array).to_numpy(zero_copy_only=False), dtype=np.bool_))
        if pa.types.is_null(kind):
            return
        if pa.types.is_struct(kind):
            for index, column in enumerate(array.flatten()):  # flatten carries the struct's nulls down
                self._feed((*path, ".", kind.field(index).name), column)
        elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
            lengths = pc.fill_null(pc.list_value_length(array).cast(pa.int64()), 0)
            self._add((*path, "length"), lengths.to_numpy())
            self._feed((*path, "[]"), array.flatten())
        elif _is_bytes(kind):
            values = pc.fill_null(array.cast(pa.large_binary()), b"")
            self._add((*path, "length"), pc.binary_length(values).cast(pa.int64()).to_numpy())
            self._add((*path, "text"), _bytes_of(values))
        elif pa.types.is_integer(kind) or pa.types.is_boolean(kind):
            self._add((*path, "integer"), pc.fill_null(array.cast(pa.int64(), safe=False), 0).to_numpy())
        elif pa.types.is_floating(kind):
            self._add((*path, "real"), pc.fill_null(array.cast(pa.float64()), 0.0).to_numpy())
        else:  # timestamps, decimals, maps: rare in prompts, so a slow way will do
            self._add((*path, str(kind)), *(f"{value!r};".encode() for value in array.to_pylist()))


def _is_bytes(kind: pa.DataType) -> bool:
    import pyarrow as pa

    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    return any(test(kind) for test in (*tests, pa.types.is_string_view, pa.types.is_binary_view))


def _bytes_of(values: pa.Array) -> memoryview:
    """The bytes of a large_binary array's texts, only those inside its slice."""
    _, offset_buffer, data = values.buffers()
    if data is None or len(values) == 0:
        return memoryview(b"")
    offsets = np.frombuffer(offset_buffer, dtype=np.int64)[values.offset : values.offset + len(values) + 1]
    return memoryview(data)[int(offsets[0]) : int(offsets[-1])]
