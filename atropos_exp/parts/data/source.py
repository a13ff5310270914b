"""One source of prompts: its files' rows and token ids, and which of them are trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from atropos_exp.errors import UserError
from atropos_exp.parts.data.cache import Cache
from atropos_exp.parts.data.counts import SourceCounts
from atropos_exp.parts.data.encode import Encoder
from atropos_exp.parts.data.reading import readable
from atropos_exp.parts.data.settings import Entry
from atropos_exp.parts.data.stored import FileStamp, StoredRows, stored_rows
from atropos_exp.parts.data.tokens import SEGMENT_ROWS, TokenFile
from atropos_exp.types import Prompt

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RawSource:
    """A source that is read and checked, but not yet filtered. Its rows are those of its files, one after the other."""

    name: str  # as in the configuration
    files: tuple[StoredRows, ...]

    @property
    def stamps(self) -> tuple[FileStamp, ...]:
        """What a resumed run compares."""
        return tuple(file.stamp for file in self.files)

    @property
    def num_rows(self) -> int:
        """The number of rows, bad ones included."""
        return sum(file.stamp.num_rows for file in self.files)

    @property
    def num_bad(self) -> int:
        """The number of bad rows."""
        return sum(file.num_bad for file in self.files)

    @property
    def keys(self) -> NDArray[np.uint64]:
        """The hash of each good row's normalised text."""
        return np.concatenate([file.keys for file in self.files])


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Source:
    """A source that is filtered and tokenised, with prompts 0 to len - 1."""

    raw: RawSource
    tokens: tuple[TokenFile, ...]  # of each file
    kept: NDArray[np.int64]  # rows of `raw`
    counts: SourceCounts
    repeats: NDArray[np.int32] | None = None  # how many earlier prompts had the same id; None: no id occurs twice

    def __len__(self) -> int:
        return len(self.kept)

    def of_kept(self, name: str) -> NDArray[np.uint64]:
        """The array `name` of the files ("keys", "id_hashes"), for each prompt."""
        whole: NDArray[np.uint64] = np.concatenate([getattr(file, name) for file in self.raw.files])
        return whole[self.kept]

    def prompt(self, index: int) -> Prompt:
        """Prompt number `index`."""
        place, number = int(self.kept[index]), 0
        while place >= len(self.raw.files[number]):
            place, number = place - len(self.raw.files[number]), number + 1
        file = self.raw.files[number]
        row = file.row(place)
        del row["prompt"]
        if self.repeats is not None and (repeat := int(self.repeats[index])):
            row["prompt_id"] += f"~{repeat + 1}"
        return Prompt(
            **{**row, "extra_info": row.get("extra_info") or {}},
            token_ids=self.tokens[number].row(place),
            is_structured=file.is_structured,
        )


def read_source(entry: Entry, cache: Cache) -> RawSource:
    """Read all files that one entry of the configuration names. Raises UserError with file, row and reason."""
    return RawSource(name=entry.name, files=tuple(stored_rows(one, cache) for one in readable(entry)))


def prepare_source(
    raw: RawSource,
    encoder: Encoder,
    cache: Cache,
    *,
    abilities: Sequence[str],
    excluded: NDArray[np.uint64],  # keys of eval prompts
    max_prompt_length: int,
    cap: int | None,  # at most this many prompts, the first ones; None: all
) -> Source:
    """Filter the rows, then tokenise until there are `cap` prompts. Raises UserError for a prompt without tokens, and
    with the reasons by number of rows if no prompt is left."""
    wanted = np.concatenate([_has_ability(file, abilities) for file in raw.files])
    right_ability = int(wanted.sum())
    if len(excluded):
        wanted &= ~np.isin(raw.keys, excluded)
    candidates = np.flatnonzero(wanted)
    cap = len(candidates) if cap is None else cap
    kept: list[NDArray[np.int64]] = []
    num_kept = seen = first_row = 0
    with ExitStack() as stack:
        tokens = tuple(stack.enter_context(TokenFile(file, encoder, cache)) for file in raw.files)
        for file, file_tokens in zip(raw.files, tokens, strict=True):
            for start in range(0, len(file), SEGMENT_ROWS):
                low, high = np.searchsorted(candidates, [first_row + start, first_row + start + SEGMENT_ROWS])
                high = min(high, np.searchsorted(candidates, first_row + len(file)))
                if low == high or num_kept >= cap:
                    continue
                rows = candidates[low:high]
                segment = file_tokens.segment(start // SEGMENT_ROWS)
                fits = np.flatnonzero(segment.lengths[rows - first_row - start] <= max_prompt_length)
                fits = fits[: cap - num_kept]
                num_kept += len(fits)
                seen = int(low + fits[-1] + 1) if num_kept == cap else int(high)
                kept.append(rows[fits])
            first_row += len(file)
    counts = SourceCounts(
        num_rows=raw.num_rows,
        num_quarantined=raw.num_bad,
        num_other_ability=len(wanted) - right_ability,
        num_eval_overlap=right_ability - len(candidates),
        num_overlong=seen - num_kept,
        num_beyond_cap=len(candidates) - seen,
        num_prompts=num_kept,
    )
    if not num_kept:
        _refuse_empty(raw, counts, abilities, max_prompt_length)
    return Source(raw=raw, tokens=tokens, kept=np.concatenate(kept), counts=counts)


def unique_ids(sources: Sequence[Source]) -> tuple[list[Source], int]:
    """The sources with unique prompt ids (the second prompt of an id gets "~2"), and how many ids were changed."""
    ids = np.concatenate([source.of_kept("id_hashes") for source in sources])
    order = np.argsort(ids, kind="stable")
    is_first = np.concatenate([[True], ids[order][1:] != ids[order][:-1]])
    if is_first.all():
        return list(sources), 0
    starts = np.maximum.accumulate(np.where(is_first, np.arange(len(ids)), 0))
    repeats = np.empty(len(ids), np.int32)
    repeats[order] = np.arange(len(ids)) - starts
    ends = np.cumsum([len(source) for source in sources])
    split = np.split(repeats, ends[:-1])
    return [dataclasses.replace(one, repeats=part) for one, part in zip(sources, split, strict=True)], int(
        np.count_nonzero(repeats)
    )


def num_copies(keys: NDArray[np.uint64]) -> int:
    """How many entries repeat an earlier one."""
    return len(keys) - len(np.unique(keys))


def _has_ability(file: StoredRows, abilities: Sequence[str]) -> NDArray[np.bool_]:
    if not abilities:
        return np.ones(len(file), np.bool_)
    return np.isin(file.ability, [number for number, name in enumerate(file.abilities) if name in abilities])


def _refuse_empty(raw: RawSource, counts: SourceCounts, abilities: Sequence[str], max_prompt_length: int) -> NoReturn:
    there = sorted({name for file in raw.files for name in file.abilities})
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
