"""A hash of a table's content, independent of how a file stores it.

Equal rows give equal hashes whatever the row groups, compression, chunking, dictionary encoding or writer version.
It works on whole columns, about a gigabyte a second.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa


def content_hash(table: pa.Table) -> str:
    """xxh3-128 over the column names, types, nulls and values of `table`, rows in order, columns by name."""
    import xxhash

    hasher = xxhash.xxh3_128()
    hasher.update(f"rows={table.num_rows}".encode())
    for name in sorted(table.column_names):
        hasher.update(f"|{name}:".encode())
        _feed(hasher, table.column(name).combine_chunks())
    return hasher.hexdigest()


def _feed(hasher: Any, array: pa.Array | pa.ChunkedArray) -> None:
    import pyarrow as pa
    import pyarrow.compute as pc

    if isinstance(array, pa.ChunkedArray):  # combine_chunks keeps a ChunkedArray when it is too long for one
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    kind = array.type
    if pa.types.is_dictionary(kind):
        _feed(hasher, array.dictionary_decode())
        return
    nulls = np.asarray(pc.is_null(array).to_numpy(zero_copy_only=False), dtype=np.bool_)
    hasher.update(f"{len(array)},".encode() + np.packbits(nulls).tobytes())
    if pa.types.is_null(kind):
        return
    if pa.types.is_struct(kind):
        names = [kind.field(index).name for index in range(kind.num_fields)]
        columns = dict(zip(names, array.flatten(), strict=True))  # flatten carries the struct's nulls down
        for name in sorted(columns):
            hasher.update(f".{name}:".encode())
            _feed(hasher, columns[name])
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        lengths = pc.fill_null(pc.list_value_length(array).cast(pa.int64()), 0)
        hasher.update(b"[" + lengths.to_numpy().tobytes())
        _feed(hasher, array.flatten())
    elif _is_bytes(kind):
        hasher.update(b"s")
        values = pc.fill_null(array.cast(pa.large_binary()), b"")
        hasher.update(pc.binary_length(values).cast(pa.int64()).to_numpy().tobytes())
        hasher.update(_bytes_of(values))
    elif pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        hasher.update(b"i" + pc.fill_null(array.cast(pa.int64(), safe=False), 0).to_numpy().tobytes())
    elif pa.types.is_floating(kind):
        hasher.update(b"f" + pc.fill_null(array.cast(pa.float64()), 0.0).to_numpy().tobytes())
    else:  # timestamps, decimals, maps: rare in prompts, so a slow way will do
        hasher.update(f"{kind}{array.to_pylist()!r}".encode())


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
