"""One source of prompts: reads, checks, filters and tokenises its files."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from atropos_exp.errors import UserError
from atropos_exp.parts.data.counts import SourceCounts
from atropos_exp.parts.data.encode import Encoder
from atropos_exp.parts.data.fingerprint import content_hash
from atropos_exp.parts.data.hub import read_verl
from atropos_exp.parts.data.parquet import read_parquet
from atropos_exp.parts.data.paths import files_of
from atropos_exp.parts.data.schema import BadRow, check_rows
from atropos_exp.parts.data.settings import Entry
from atropos_exp.types import Prompt, TokenIds

if TYPE_CHECKING:
    import pyarrow as pa

_CHUNK = 8192  # rows tokenised before looking whether there are enough


@dataclass(frozen=True, kw_only=True, slots=True)
class FileStamp:
    """A file as a resumed run must find it again."""

    name: str
    content_hash: str
    num_rows: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RawSource:
    """A source that is read and checked, but not yet filtered."""

    name: str  # as in the configuration
    files: tuple[FileStamp, ...]
    bad: tuple[BadRow, ...]
    table: pa.Table  # the good rows of all files (see schema.GoodRows), with the column `file`, its number
    extra_info: tuple[pa.Array | None, ...]  # per file, aligned with its rows
    first_row: tuple[int, ...]  # per file, where its rows begin in `table`


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Source:
    """A source that is filtered and tokenised, with prompts 0 to len - 1."""

    raw: RawSource
    table: pa.Table  # the kept rows, with the column `place`, their row in raw.table
    token_ids: list[TokenIds]
    counts: SourceCounts

    def __len__(self) -> int:
        return len(self.token_ids)

    def prompt(self, index: int) -> Prompt:
        """Prompt number `index`."""
        row = {name: self.table.column(name)[index].as_py() for name in _PROMPT_COLUMNS}
        file = row.pop("file")
        extra = self.raw.extra_info[file]
        place = self.table.column("place")[index].as_py() - self.raw.first_row[file]
        info = extra[place].as_py() if extra is not None else None
        return Prompt(token_ids=self.token_ids[index], extra_info=info or {}, **row)


_PROMPT_COLUMNS = ("prompt_id", "data_source", "text", "ground_truth", "ability", "file")


def read_source(entry: Entry) -> RawSource:
    """Read all files that one entry of the configuration names. Raises UserError with file, row and reason."""
    import pyarrow as pa

    tables: list[tuple[str, str, pa.Table]] = []  # file name, split for prompt ids, rows
    if entry.is_hub:
        tables.append((entry.name, entry.split, read_verl(entry.name, default_split=entry.split)))
    else:
        paths = files_of(entry.name, key=entry.key)
        tables.extend((str(path), path.stem, read_parquet(path)) for path in paths)
    stamps, bad, good, extras = [], [], [], []
    for number, (file, split, table) in enumerate(tables):
        rows, file_bad = check_rows(table, file, split=split)
        stamps.append(FileStamp(name=file, content_hash=content_hash(table), num_rows=table.num_rows))
        bad.extend(file_bad)
        good.append(rows.table.append_column("file", pa.array([number] * rows.table.num_rows, pa.int32())))
        extras.append(rows.extra_info)
    starts = np.concatenate([[0], np.cumsum([table.num_rows for table in good])])
    return RawSource(
        name=entry.name,
        files=tuple(stamps),
        bad=tuple(bad),
        table=pa.concat_tables(good).combine_chunks(),
        extra_info=tuple(extras),
        first_row=tuple(int(start) for start in starts[:-1]),
    )


def prepare_source(
    raw: RawSource,
    encoder: Encoder,
    *,
    abilities: Sequence[str],
    excluded: pa.Array | None,  # keys of eval prompts
    max_prompt_length: int,
    cap: int | None,  # at most this many prompts, the first ones; None: all
) -> Source:
    """Filter the rows, then tokenise until there are `cap` prompts. Raises UserError for a prompt without tokens, and
    with the reasons by number of rows if no prompt is left."""
    import pyarrow as pa
    import pyarrow.compute as pc

    table = raw.table.append_column("place", pa.array(np.arange(raw.table.num_rows)))
    good = table.num_rows
    if abilities:
        table = table.filter(pc.is_in(table.column("ability"), pa.array(list(abilities))))
    right_ability = table.num_rows
    if excluded is not None and len(excluded):
        table = table.filter(pc.invert(pc.is_in(table.column("key"), excluded)))
    candidates = table.num_rows
    token_ids: list[TokenIds] = []
    kept: list[int] = []
    seen = overlong = 0
    while seen < candidates and (cap is None or len(kept) < cap):
        size = min(_CHUNK, candidates - seen) if cap is None else min(_CHUNK, candidates - seen, cap - len(kept))
        prompts = pa.concat_arrays(table.column("prompt").slice(seen, size).chunks)
        for row, ids in enumerate(encoder.encode(prompts), start=seen):
            if not len(ids):
                text = table.column("text")[row].as_py()
                raise UserError(f"data: the tokenizer gives no token for a prompt of {raw.name}: {text!r}")
            if len(ids) <= max_prompt_length:
                kept.append(row)
                token_ids.append(ids)
            else:
                overlong += 1
        seen += size
    counts = SourceCounts(
        num_rows=good + len(raw.bad),
        num_quarantined=len(raw.bad),
        num_other_ability=good - right_ability,
        num_eval_overlap=right_ability - candidates,
        num_overlong=overlong,
        num_beyond_cap=candidates - seen,
        num_prompts=len(kept),
    )
    if not kept:
        _refuse_empty(raw, counts, abilities, max_prompt_length)
    return Source(
        raw=raw, table=table.take(pa.array(kept, pa.int64())).combine_chunks(), token_ids=token_ids, counts=counts
    )


def unique_ids(sources: Sequence[Source]) -> tuple[list[Source], int]:
    """The sources with unique prompt ids (the second prompt of an id gets "~2"), and how many ids were changed."""
    import pyarrow as pa
    import pyarrow.compute as pc

    columns = [source.table.column("prompt_id") for source in sources]
    together = pa.chunked_array([chunk for column in columns for chunk in column.chunks], pa.string())
    if len(pc.unique(together)) == len(together):
        return list(sources), 0
    seen: dict[str, int] = {}
    renamed, result = 0, []
    for source, column in zip(sources, columns, strict=True):
        ids = []
        for one in column.to_pylist():
            seen[one] = count = seen.get(one, 0) + 1
            renamed += count > 1
            ids.append(one if count == 1 else f"{one}~{count}")
        place = source.table.schema.get_field_index("prompt_id")
        table = source.table.set_column(place, "prompt_id", pa.array(ids, pa.string()))
        result.append(dataclasses.replace(source, table=table))
    return result, renamed


def _refuse_empty(raw: RawSource, counts: SourceCounts, abilities: Sequence[str], max_prompt_length: int) -> NoReturn:
    there = sorted(set(raw.table.column("ability").to_pylist()))
    reasons = (
        (counts.num_quarantined, "are bad"),
        (counts.num_other_ability, f"are not of ability {', '.join(abilities)} (there: {there})"),
        (counts.num_eval_overlap, "are eval prompts"),
        (counts.num_overlong, f"are longer than max_prompt_length={max_prompt_length} tokens"),
    )
    raise UserError(
        f"data: {raw.name} gives no prompt: of {counts.num_rows} rows "
        f"{'; '.join(f'{number} {reason}' for number, reason in reasons if number) or 'none is wanted'}"
    )
