"""A folder that can prove it is whole: `manifest.json` lists every file with its size and hash.

    seal(draft, {"step": 10})  # then rename `draft` to its final name
    verify(folder)  # {"step": 10}, or DamagedError with the file that is missing or changed

A folder is sealed while it still has a temporary name, then renamed: under its final name it is either complete, or
one can tell what is missing, also after a power failure.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

from atropos_exp.interfaces import JSON
from atropos_exp.runs.atomic import fsync

MANIFEST = "manifest.json"
FORMAT = 1
_NUM_THREADS = 4  # hashing and fsync release the GIL


class DamagedError(RuntimeError):
    """A folder is not what its manifest says. The message names the file and what is wrong with it."""


def seal(folder: Path, about: JSON) -> None:
    """List and hash every file under `folder`, write the manifest with `about`, and flush all of it to the disk."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        entries = list(pool.map(_entry, paths))
    names = [path.relative_to(folder).as_posix() for path in paths]
    body = {"format": FORMAT, "about": about, "files": dict(zip(names, entries, strict=True))}
    _write(folder / MANIFEST, _dump(body))
    for directory in [*(path for path in folder.rglob("*") if path.is_dir()), folder]:
        fsync(directory)


def verify(folder: Path) -> JSON:
    """Return the `about` that `folder` was sealed with. Raises DamagedError unless every listed file is intact.

    Files that the manifest does not list are not looked at.
    """
    body = read(folder)
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        list(pool.map(lambda item: _check(folder / item[0], item[0], item[1]), body["files"].items()))
    about: JSON = body["about"]
    return about


def read(folder: Path) -> JSON:
    """Return the manifest, itself verified, without reading the files that it lists."""
    path = folder / MANIFEST
    try:
        text = path.read_bytes()
    except OSError as error:
        raise DamagedError(f"{MANIFEST} cannot be read: {error.strerror or error}") from error
    try:
        body = json.loads(text)
        intact = _dump(body) == text  # byte for byte, its own hash included
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{MANIFEST} is damaged: {error}") from error
    if not intact:
        raise DamagedError(f"{MANIFEST} is damaged: its own hash does not match")
    if body["format"] != FORMAT:
        raise DamagedError(f"{MANIFEST} has format {body['format']}, this version reads {FORMAT}")
    result: JSON = body
    return result


def num_bytes(folder: Path) -> int:
    """Return how many bytes the listed files have together."""
    return sum(entry["bytes"] for entry in read(folder)["files"].values())


def _entry(path: Path) -> JSON:
    entry = {"bytes": path.stat().st_size, "xxh3_128": _hash(path)}
    fsync(path)
    return entry


def _check(path: Path, name: str, entry: JSON) -> None:
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise DamagedError(f"{name} has {size} bytes, its manifest says {entry['bytes']}")
        digest = _hash(path)
    except OSError as error:
        raise DamagedError(f"{name} cannot be read: {error.strerror or error}") from error
    if digest != entry["xxh3_128"]:
        raise DamagedError(f"{name} is damaged: its hash is {digest}, its manifest says {entry['xxh3_128']}")


def _hash(path: Path) -> str:
    with open(path, "rb", buffering=0) as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def _dump(body: JSON) -> bytes:
    """Canonical text with the hash of everything else in it, so that the manifest can be checked by itself."""
    rest = {key: value for key, value in body.items() if key != "xxh3_128"}
    digest = xxhash.xxh3_128(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**rest, "xxh3_128": digest}, indent=1, sort_keys=True) + "\n").encode()


def _write(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        while content:
            content = content[os.write(descriptor, content) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
