"""Files that are either whole or absent, whenever the process or the machine dies."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to; on success its bytes reach the disk and it becomes `path`.

        with replacing(folder / "table.parquet") as draft:
            write_table(draft)

    An exception leaves `path` as it was. Temporary files start with a dot; those of dead processes may be deleted.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield draft
        fsync(draft)
        draft.replace(path)
        fsync(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def write_atomic(path: Path, content: str | bytes, *, mode: int | None = None) -> None:
    """Replace the file `path` by `content` (text as UTF-8), with the permissions `mode` from the first byte on."""
    with replacing(path) as draft:
        if mode is not None:
            draft.touch(mode=mode)
        draft.write_bytes(content.encode() if isinstance(content, str) else content)


def fsync(path: Path) -> None:
    """Make the content of a file, or the names in a directory, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
