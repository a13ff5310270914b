"""A data set on disk: built once, under a lock, whole or not at all, and verified whenever it is used again."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from atropos_exp.errors import UserError
from atropos_exp.parts.data.fingerprint import content_hash
from atropos_exp.parts.data.parquet import read_parquet, write_parquet
from atropos_exp.processes.locks import try_hold
from atropos_exp.runs import manifest
from atropos_exp.runs.atomic import fsync
from data_prep.assemble import assemble, check_disjoint
from data_prep.builder import Builder, arguments_of

FILES = ("train.parquet", "test.parquet")
_POLL_S = 0.05


def build_into(folder: Path, builder: Builder, *, deadline_s: float, say: Callable[[str], None]) -> dict[str, Any]:
    """Build the data set in `folder` unless it is there, verify it, and return the `about` of its manifest.

    Raises UserError if the folder holds something else or was changed, or if another process builds it for longer
    than `deadline_s`.
    """
    folder = folder.expanduser()
    if (folder / manifest.MANIFEST).exists():
        return _verified(folder, builder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.parent / f".{folder.name}.lock", deadline_s, say):
            if (folder / manifest.MANIFEST).exists():  # another process has built it meanwhile
                return _verified(folder, builder)
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise UserError(
                    f"{folder} is there and is no data set of this program (no manifest.json); name another folder"
                )
            return _build(folder, builder)
    except OSError as error:
        raise UserError(f"{folder}: the data set cannot be written: {error}") from error


def _build(folder: Path, builder: Builder) -> dict[str, Any]:
    data = assemble(builder)
    draft = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(draft, ignore_errors=True)  # left by a dead process of the same number
    draft.mkdir()
    try:
        tables = {}
        for name, table in zip(FILES, (data.train, data.test), strict=True):
            write_parquet(table, draft / name)
            tables[name] = read_parquet(draft / name)  # what is sealed is what can be read again
        check_disjoint(tables["train.parquet"], tables["test.parquet"])
        about = {
            **_identity(builder),
            "source": data.source,
            "seed": arguments_of(builder).get("seed"),
            "counts": dict(data.counts),
            "tables": {
                name: {"num_rows": table.num_rows, "content_hash": content_hash(table)}
                for name, table in tables.items()
            },
        }
        manifest.seal(draft, about)
        draft.rename(folder)
        fsync(folder.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return about


def _verified(folder: Path, builder: Builder) -> dict[str, Any]:
    try:
        about = manifest.verify(folder)
    except manifest.DamagedError as error:
        raise UserError(
            f"{folder}: changed since it was built: {error}; remove the folder, it is then built again"
        ) from error
    wanted, found = _identity(builder), {key: about.get(key) for key in _identity(builder)}
    if found != wanted:
        raise UserError(
            f"{folder}: holds another data set: {_difference(found, wanted)}; name another folder, or remove this one"
        )
    return about


def _identity(builder: Builder) -> dict[str, Any]:
    return {"builder": builder.NAME, "builder_version": builder.VERSION, "arguments": arguments_of(builder)}


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    before, now = ({**one, **(one["arguments"] or {})} for one in (found, wanted))
    parts = [
        f"{key} was {before.get(key)!r}, asked for {now.get(key)!r}"
        for key in sorted({*before, *now} - {"arguments"})
        if before.get(key) != now.get(key)
    ]
    return "; ".join(parts)


@contextmanager
def _lock(path: Path, deadline_s: float, say: Callable[[str], None]) -> Iterator[None]:
    """Held by one process at a time; the system releases it when that process dies."""
    deadline = time.monotonic() + deadline_s
    waiting = False
    while (lock := try_hold(path, holder=str(os.getpid()))) is None:
        holder = path.read_text().strip() or "unknown"
        if time.monotonic() > deadline:
            raise UserError(
                f"waited {deadline_s:.0f} s for process {holder} to build {path.name[1:-5]} (lock {path}); "
                "wait for it or stop it, then try again"
            )
        if not waiting:
            say(f"waiting for process {holder}, which builds the same data set ({path})")
            waiting = True
        time.sleep(_POLL_S)
    with lock:
        yield
