"""The folder `data.cache`: checked rows and token ids, made once and shared by all processes and runs.

    rows-<hash>/     the good rows of one file or data set: hash of its bytes and of the code that reads them
    tokens-<hash>/   their token ids: hash of the rows, of the tokenizer with its template, and of the format

Whatever is in it can be made again, so it may be deleted at any time; what is damaged is made again. Entries that were
not used for the longest time make room where all are larger than `MAX_BYTES` together.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from atropos_exp.errors import UserError
from atropos_exp.interfaces import JSON
from atropos_exp.processes.locks import try_hold
from atropos_exp.runs import manifest

MAX_BYTES = 32 * 2**30
KEPT_SECONDS = 24 * 3600.0  # since its last use, in which an entry is never removed
STALL_SECONDS = 120.0  # without a new byte, after which another process is not waited for any longer
_POLL_SECONDS = 0.1


class Cache:
    """The entries below one folder. Raises UserError where it cannot be written."""

    def __init__(self, root: Path) -> None:
        self._root = root.expanduser()

    def sealed(self, name: str, build: Callable[[Path], JSON]) -> tuple[Path, JSON]:
        """The intact entry `name` and what its manifest says about it; `build(draft)` writes the files if there is
        none and returns that."""
        folder = self._root / name
        about = self._intact(folder)
        if about is None:
            with self.writing(), self.holding(name):
                about = self._intact(folder)
                if about is None:
                    about = self._build(folder, build)
            self._make_room(keep=name)
        self._touch(folder)
        return folder, about

    def open_folder(self, name: str) -> Path:
        """The folder of the entry `name`, whose files are written and checked one by one."""
        folder = self._root / name
        with self.writing():
            folder.mkdir(parents=True, exist_ok=True)
        self._touch(folder)
        return folder

    @contextmanager
    def holding(self, name: str) -> Iterator[None]:
        """Hold the lock of an entry. While another process has it and writes, it is waited for; if that one stalls, or
        the file system has no locks, this one works beside it: every file is replaced as a whole."""
        self._root.mkdir(parents=True, exist_ok=True)
        path = self._root / f".{name}.lock"
        size, since, told = -1, time.monotonic(), False
        while (lock := try_hold(path, holder=str(os.getpid()))) is None:
            if (now := self._size(name)) != size:
                size, since = now, time.monotonic()
            if time.monotonic() - since > STALL_SECONDS:
                break
            if not told:
                print(
                    f"data: waiting for process {path.read_text() or 'unknown'}, which reads the same data", flush=True
                )
                told = True
            time.sleep(_POLL_SECONDS)
        with lock or contextlib.nullcontext():
            yield

    @contextmanager
    def writing(self) -> Iterator[None]:
        """An OSError in this block is the cache's."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"data.cache: {self._root} cannot be written: {error.strerror or error}; name another folder"
            ) from error

    def _intact(self, folder: Path) -> JSON | None:
        if not folder.is_dir():
            return None
        try:
            return manifest.verify(folder)
        except manifest.DamagedError as error:
            print(f"data.cache: {folder} is made again: {error}", flush=True)
            return None

    def _build(self, folder: Path, build: Callable[[Path], JSON]) -> JSON:
        for left in self._root.glob(f".{folder.name}.*.tmp"):  # by processes that died
            shutil.rmtree(left, ignore_errors=True)
        draft = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        draft.mkdir()
        try:
            about = build(draft)
            manifest.seal(draft, about)
            shutil.rmtree(folder, ignore_errors=True)  # damaged
            draft.rename(folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return about

    def _size(self, name: str) -> int:
        """The bytes of an entry and of its drafts."""
        return sum(_num_bytes(folder) for pattern in (name, f".{name}.*.tmp") for folder in self._root.glob(pattern))

    def _make_room(self, *, keep: str) -> None:
        now = time.time()
        entries = [folder for folder in self._root.glob("*-*") if folder.is_dir() and not folder.name.startswith(".")]
        used = {folder: folder.stat().st_mtime for folder in entries}
        sizes = {folder: _num_bytes(folder) for folder in entries}
        excess = sum(sizes.values()) - MAX_BYTES
        for folder in sorted(entries, key=used.__getitem__):
            if excess <= 0:
                return
            if folder.name != keep and now - used[folder] > KEPT_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
                excess -= sizes[folder]

    def _touch(self, folder: Path) -> None:
        with contextlib.suppress(OSError):  # it may belong to another user
            os.utime(folder)


def _num_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # gone meanwhile
            total += path.stat().st_size if path.is_file() else 0
    return total
