"""Hugging Face data sets, from the hub or a local copy, as Arrow tables. The only importer of `datasets`."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atropos_exp.errors import UserError
from atropos_exp.parts.data.pairs import ANSWERS, QUESTIONS, recognise_table
from atropos_exp.parts.data.raw import FORMATS, RawFormat, verl_row
from atropos_exp.parts.data.rows import NO_TRUTH
from atropos_exp.parts.data.schema import REQUIRED
from atropos_exp.parts.data.unseen import RAW, raw_task_columns

if TYPE_CHECKING:
    import pyarrow as pa

LOCAL_BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".arrow": "arrow"}
_PIECE_ROWS = 2048


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Opened:
    """A file or data set in verl's schema, to be read once."""

    pieces: Iterator[pa.Table]
    note: str | None = None  # what was guessed
    no_truth: str = NO_TRUTH  # what a row lacks without a ground truth


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetName:
    """The name of a data set: id[:config][@split], such as `openai/gsm8k:main@test`, or a folder instead of the id."""

    source: str  # hub id, or a folder
    config: str | None
    split: str | None

    @classmethod
    def parse(cls, text: str) -> DatasetName:
        """Split `text` into its parts. Raises UserError."""
        head, at, split = text.partition("@")
        source, colon, config = head.partition(":")
        if not source or (at and not split) or (colon and not config):
            raise UserError(f"data set {text!r}: expected id[:config][@split], such as openai/gsm8k:main@train")
        return cls(source=source, config=config or None, split=split or None)

    @property
    def folder(self) -> Path | None:
        """The local folder that `source` names, or None if it is a hub id."""
        path = Path(self.source).expanduser()
        return path if path.is_dir() or self.source.startswith(("/", "~", ".")) else None

    def problem(self) -> str | None:
        """What is wrong with the name, as far as it can be seen without a network; None if nothing."""
        if self.folder is not None and not self.folder.is_dir():
            return f"data set folder {self.source} does not exist"
        if self.folder is None and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", self.source):
            return f"data set {self.source!r} is neither a folder nor a hub id such as openai/gsm8k"
        return None


def read_verl(text: str, *, default_split: str) -> Opened:
    """The data set named `text` in verl's schema, converted if it is in a known raw format. Raises UserError."""
    return in_verls_schema(read_table(text, default_split=default_split), text, default_split=default_split)


def read_table(text: str, *, default_split: str) -> pa.Table:
    """The data set named `text` as it is. Raises UserError."""
    name, split = _name_and_split(text, default_split)
    return read_splits(name.source, name.config, [split])[split]


def in_verls_schema(table: pa.Table, text: str, *, default_split: str) -> Opened:
    """The rows of `table`, of the data set named `text`, as rows in verl's schema. Raises UserError."""
    _, split = _name_and_split(text, default_split)
    if set(REQUIRED) <= set(table.column_names):
        return Opened(pieces=_slices(table))
    known = recognise_table(table, Path(DatasetName.parse(text).source).name)
    if known is None:
        names = "; ".join(f"{one.name}: {', '.join(sorted(one.columns))}" for one in FORMATS)
        raise UserError(
            f"data set {text}: its columns {', '.join(table.column_names)} are not known; expected verl's schema or "
            f"{names}; or a question ({' | '.join(QUESTIONS)}) and a final answer ({' | '.join(ANSWERS)})"
        )
    raw_format, note = known
    return Opened(
        pieces=_converted(table, raw_format, split),
        note=f"{text}: {note}",
        no_truth=f"{NO_TRUTH}: {raw_format.no_truth}",
    )


def local_files(text: str, *, default_split: str) -> list[Path] | None:
    """The files that `read_verl` would read, or None if `text` names a data set of the hub. Raises UserError."""
    name, split = _name_and_split(text, default_split)
    if name.folder is None:
        return None
    folder = _folder(name.source, name.folder, name.config)
    return _all_files(folder) if _is_saved(folder) else _files_of_splits(folder, [split])[split]


def _name_and_split(text: str, default_split: str) -> tuple[DatasetName, str]:
    name = DatasetName.parse(text)
    return name, name.split or default_split


def _slices(table: pa.Table) -> Iterator[pa.Table]:
    for start in range(0, table.num_rows, _PIECE_ROWS):
        yield table.slice(start, _PIECE_ROWS)


def _converted(table: pa.Table, raw_format: RawFormat, split: str) -> Iterator[pa.Table]:
    import pyarrow as pa

    beside = raw_task_columns(table.schema)
    for number, piece in enumerate(_slices(table)):
        raws = enumerate(piece.to_pylist(), start=number * _PIECE_ROWS)
        rows = pa.Table.from_pylist([verl_row(raw, raw_format, split=split, index=row) for row, raw in raws])
        for name in beside:
            rows = rows.append_column(RAW + name, piece.column(name))
        yield rows


def read_splits(
    source: str, config: str | None, wanted: list[str], *, revision: str | None = None, is_folder: bool = False
) -> dict[str, pa.Table]:
    """The `wanted` splits that exist, by name. `is_folder`: `source` is a folder, so never ask the hub.

    An unreachable hub is tried a few times within about half a minute. Raises UserError.
    """
    import datasets

    name = DatasetName(source=source, config=config, split=None)
    folder = Path(source).expanduser() if is_folder else name.folder
    if folder is not None:
        folder = _folder(source, folder, config)
    if folder is None and (problem := name.problem()):
        raise UserError(problem)
    datasets.disable_progress_bars()
    try:
        if folder is not None:
            return _read_folder(folder, wanted)
        loaded = datasets.load_dataset(source, config, revision=revision)
        return _tables(loaded, wanted, source)
    except UserError:
        raise
    except Exception as error:  # the library raises many kinds: all mean that the data set cannot be had
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"data set {source}{f':{config}' if config else ''} cannot be loaded: {reason}; "
            "check the id and the network, or use a local copy (a folder here, --from DIR in data_prep)"
        ) from error
    finally:
        datasets.enable_progress_bars()


def _folder(source: str, folder: Path, config: str | None) -> Path:
    if not folder.is_dir():
        raise UserError(f"data set folder {source} does not exist (looked for {folder.absolute()})")
    return folder / config if config is not None and (folder / config).is_dir() else folder


def _is_saved(folder: Path) -> bool:
    """Whether the folder is the output of `save_to_disk`."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _all_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _files_of_splits(folder: Path, wanted: list[str]) -> dict[str, list[Path]]:
    """The files of each split, by their names or their folder's. Raises UserError if there are none."""
    files = [path for path in _all_files(folder) if path.suffix in LOCAL_BUILDERS]
    by_split = {split: [file for file in files if re.match(rf"{split}(\W|_|$)", file.name)] for split in wanted}
    by_folder = {split: [file for file in files if file.parent.name == split] for split in wanted}
    found = {split: by_split[split] or by_folder[split] for split in wanted}
    if not any(found.values()):
        listing = ", ".join(str(file.relative_to(folder)) for file in files[:6]) or "none"
        raise UserError(
            f"{folder}: found no file of split {' or '.join(wanted)}; expected dataset_dict.json (save_to_disk) or "
            f"files such as {wanted[0]}.parquet, {wanted[0]}-00000-of-00001.parquet; data files there: {listing}"
        )
    return found


def _read_folder(folder: Path, wanted: list[str]) -> dict[str, pa.Table]:
    """Read the output of `save_to_disk`, a clone of a hub repository, or files named after their split."""
    import datasets

    if _is_saved(folder):
        return _tables(datasets.load_from_disk(str(folder)), wanted, str(folder))
    found = _files_of_splits(folder, wanted)
    tables = {}
    for split, split_files in found.items():
        if split_files:
            kinds = {LOCAL_BUILDERS[file.suffix] for file in split_files}
            if len(kinds) > 1:
                raise UserError(f"{folder}: split {split} comes in several file types: {', '.join(sorted(kinds))}")
            with tempfile.TemporaryDirectory() as cache:  # nothing stale, nothing left behind
                names = [str(file) for file in split_files]
                loaded = datasets.load_dataset(
                    kinds.pop(), data_files={split: names}, cache_dir=cache, keep_in_memory=True
                )
                tables.update(_tables(loaded, [split], str(folder)))
    return tables


def _tables(loaded: Any, wanted: list[str], source: str) -> dict[str, pa.Table]:
    """The `wanted` splits as Arrow tables, rows in order."""
    if not isinstance(loaded, dict):  # one Dataset without splits counts as its only split
        loaded = {str(loaded.split or wanted[0]): loaded}
    found = {split: loaded[split].with_format("arrow")[:] for split in wanted if split in loaded}
    if not found:
        raise UserError(f"data set {source}: has the splits {', '.join(loaded)}; expected {' or '.join(wanted)}")
    return found
