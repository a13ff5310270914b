"""The held-out prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from atropos_exp.errors import UserError
from atropos_exp.parts.data.cache import Cache
from atropos_exp.parts.data.encode import Encoder
from atropos_exp.parts.data.mix import permutation
from atropos_exp.parts.data.quarantine import refuse_too_many_bad
from atropos_exp.parts.data.settings import DataSettings
from atropos_exp.parts.data.source import RawSource, prepare_source, read_source, unique_ids
from atropos_exp.types import Prompt

_SEED = 0  # fixed, so that runs of different seeds are compared on the same prompts


def read_eval(settings: DataSettings, prepared_folder: Path | None, cache: Cache) -> list[RawSource]:
    """All held-out sources, read and checked."""
    return [read_source(entry, cache) for entry in settings.eval_sources(prepared_folder)]


def eval_prompts(
    settings: DataSettings, tokenizer: Any, *, num_prompts: int, max_prompt_length: int, prepared_folder: Path | None
) -> list[Prompt]:
    """A fixed random choice of `num_prompts` (or all, if fewer) of the held-out prompts. Raises UserError if none."""
    cache = Cache(Path(settings.cache))
    raws = read_eval(settings, prepared_folder, cache)
    if not raws:
        raise UserError(
            "data.eval_paths: it is empty; expected held-out parquet files (or eval.num_prompts=0 for no eval)"
        )
    refuse_too_many_bad(raws, settings.max_bad_fraction)
    encoder = Encoder(settings, tokenizer)
    sources = [
        prepare_source(
            raw,
            encoder,
            cache,
            abilities=settings.ability,
            excluded=np.empty(0, np.uint64),
            max_prompt_length=max_prompt_length,
            cap=None,
        )
        for raw in raws
    ]
    sources, _ = unique_ids(sources)
    places = [(source, row) for source in sources for row in range(len(source))]
    order = permutation(_SEED, 0, 0, len(places))[:num_prompts]
    return [source.prompt(row) for source, row in (places[index] for index in order)]
