"""The held-out prompts."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atropos_exp.errors import UserError
from atropos_exp.parts.data.encode import Encoder
from atropos_exp.parts.data.mix import permutation
from atropos_exp.parts.data.quarantine import refuse_too_many_bad
from atropos_exp.parts.data.settings import DataSettings
from atropos_exp.parts.data.source import RawSource, prepare_source, read_source, unique_ids
from atropos_exp.types import Prompt

if TYPE_CHECKING:
    import pyarrow as pa

_SEED = 0  # fixed, so that runs of different seeds are compared on the same prompts


def read_eval(settings: DataSettings, prepared_folder: Path | None) -> list[RawSource]:
    """All held-out sources, read and checked."""
    return [read_source(entry) for entry in settings.eval_sources(prepared_folder)]


def keys_of(sources: Iterable[RawSource]) -> pa.Array | None:
    """The normalised texts of all held-out prompts; None without any."""
    import pyarrow as pa

    chunks = [chunk for source in sources for chunk in source.table.column("key").chunks]
    return pa.concat_arrays(chunks) if chunks else None


def eval_prompts(
    settings: DataSettings, tokenizer: Any, *, num_prompts: int, max_prompt_length: int, prepared_folder: Path | None
) -> list[Prompt]:
    """A fixed random choice of `num_prompts` (or all, if fewer) of the held-out prompts. Raises UserError if none."""
    raws = read_eval(settings, prepared_folder)
    if not raws:
        raise UserError(
            "data.eval_paths: it is empty; expected held-out parquet files (or eval.num_prompts=0 for no eval)"
        )
    refuse_too_many_bad(raws, settings.max_bad_fraction)
    encoder = Encoder(settings, tokenizer)
    sources = [
        prepare_source(
            raw, encoder, abilities=settings.ability, excluded=None, max_prompt_length=max_prompt_length, cap=None
        )
        for raw in raws
    ]
    sources, _ = unique_ids(sources)
    places = [(source, row) for source in sources for row in range(len(source))]
    order = permutation(_SEED, 0, 0, len(places))[:num_prompts]
    return [source.prompt(row) for source, row in (places[index] for index in order)]
