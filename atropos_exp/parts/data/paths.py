"""From paths as the user wrote them (`~`, globs, a string or a list) to existing files."""

import difflib
import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atropos_exp.errors import UserError


def as_strings(value: Any) -> tuple[str, ...]:
    """null, a string or a list of strings as a tuple. Raises UserError for anything else."""
    if value is None:
        return ()
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, Sequence) or not all(isinstance(item, str) and item.strip() for item in items):
        raise UserError(f"must be a non-empty string or a list of them; got {value!r}")
    return tuple(items)


def files_of(pattern: str, *, key: str) -> list[Path]:
    """The files that a path or glob names, sorted. If there are none, raises UserError with similar names."""
    path = Path(pattern).expanduser()
    if path.is_file():  # also a file whose name happens to contain [ or *
        return [path]
    if path.is_dir():
        found = sorted(path.glob("*.parquet"))
        hint = (
            f"; name the files, such as {pattern.rstrip('/')}/train.parquet" if found else "; it holds no .parquet file"
        )
        raise UserError(f"{key}: {pattern} is a folder{hint}")
    if glob.has_magic(str(path)):
        matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
        files = [match for match in matches if match.is_file()]
        if files:
            return files
        raise UserError(f"{key}: no file matches {pattern}{_neighbours(path)}")
    raise UserError(f"{key}: {pattern} does not exist (looked for {path.absolute()}){_neighbours(path)}")


def _neighbours(path: Path) -> str:
    """A hint for a missing path: similar names, else the contents of the nearest folder that exists."""
    parent = path.absolute().parent
    while not parent.is_dir():
        path, parent = parent, parent.parent
        if glob.has_magic(path.name):
            continue
    names = sorted(entry.name for entry in parent.iterdir() if not entry.name.startswith("."))
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    if close:
        return "; did you mean " + " or ".join(str(parent / name) for name in close) + "?"
    if not names:
        return f"; {parent} is empty"
    return f"; {parent} holds {', '.join(names[:6])}{' ...' if len(names) > 6 else ''}"
