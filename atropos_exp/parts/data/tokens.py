"""The token ids of a file's rows, in segments on disk that are mapped into memory.

A segment is one file: 16 bytes of hash of the rest, then int32: the number of tokens of each of its rows, and the ids
of all rows one after the other.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from atropos_exp.parts.data.cache import Cache
from atropos_exp.parts.data.encode import Encoder
from atropos_exp.parts.data.progress import Progress
from atropos_exp.parts.data.stored import StoredRows
from atropos_exp.runs.atomic import write_atomic
from atropos_exp.types import TokenIds

if TYPE_CHECKING:
    from numpy.typing import NDArray

SEGMENT_ROWS = 8192
_HASH_BYTES = 16


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Segment:
    """The token ids of SEGMENT_ROWS rows, or of the last ones of a file."""

    digest: bytes  # of lengths and ids
    lengths: NDArray[np.int32]  # tokens of each row
    ends: NDArray[np.int64]  # where each row's ids end in `ids`
    ids: TokenIds

    def row(self, index: int) -> TokenIds:
        """A copy of the ids of one row."""
        end = int(self.ends[index])
        return np.array(self.ids[end - int(self.lengths[index]) : end], np.int32)


class TokenFile:
    """The segments of one file. A context manager: while it is open, missing ones are made and others wait for it."""

    def __init__(self, rows: StoredRows, encoder: Encoder, cache: Cache) -> None:
        self._rows = rows
        self._encoder = encoder
        self._cache = cache
        self._name = f"tokens-{encoder.identity(rows.folder.name)}"
        self._folder = cache.open_folder(self._name)
        self._segments: dict[int, Segment] = {}
        self._lock = ExitStack()
        self._progress: Progress | None = None

    def segment(self, number: int) -> Segment:
        """Segment `number`, tokenised if that was not done before. Raises UserError if a prompt has no token."""
        if number not in self._segments:
            found = self._open(number)
            if found is None:
                if self._progress is None:
                    self._lock.enter_context(self._cache.holding(self._name))
                    for left in self._folder.glob(".*.tmp"):  # by processes that died
                        left.unlink(missing_ok=True)
                    self._progress = Progress("tokenised", f"prompts of {self._rows.name}", len(self._rows))
                found = self._open(number) or self._make(number)
            self._segments[number] = found
        return self._segments[number]

    def row(self, index: int) -> TokenIds:
        """The token ids of a row whose segment is there."""
        return self._segments[index // SEGMENT_ROWS].row(index % SEGMENT_ROWS)

    def digests(self) -> bytes:
        """The hashes of all segments that are there, in order."""
        return b"".join(self._segments[number].digest for number in sorted(self._segments))

    def __enter__(self) -> TokenFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def _num_rows(self, number: int) -> int:
        return min(SEGMENT_ROWS, len(self._rows) - number * SEGMENT_ROWS)

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:06d}.tokens"

    def _open(self, number: int) -> Segment | None:
        """The segment on disk; None if there is none, or a damaged one."""
        import xxhash

        path, num_rows = self._path(number), self._num_rows(number)
        try:
            content = path.read_bytes()
            digest = content[:_HASH_BYTES]
            if len(content) < _HASH_BYTES + 4 * num_rows or xxhash.xxh3_128_digest(content[_HASH_BYTES:]) != digest:
                print(f"data.cache: {path} is damaged and made again", flush=True)
                return None
            values = np.memmap(path, np.int32, mode="r", offset=_HASH_BYTES)
        except OSError:
            return None
        lengths = values[:num_rows]
        return Segment(digest=digest, lengths=lengths, ends=np.cumsum(lengths, dtype=np.int64), ids=values[num_rows:])

    def _make(self, number: int) -> Segment:
        import xxhash

        start, size = number * SEGMENT_ROWS, self._num_rows(number)
        pieces = [self._encoder.encode(prompts) for prompts in self._rows.prompts(start, size)]
        content = b"".join(array.tobytes() for array in [one[0] for one in pieces] + [one[1] for one in pieces])
        with self._cache.writing():
            write_atomic(self._path(number), xxhash.xxh3_128_digest(content) + content)
        assert self._progress is not None
        self._progress.at(start + size)
        made = self._open(number)
        assert made is not None, f"{self._path(number)} was written, and is not what was written"
        return made
