"""The endless stream of training prompts, whose position is a single number."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from atropos_exp.errors import UserError
from atropos_exp.interfaces import JSON
from atropos_exp.parts.data.cache import Cache
from atropos_exp.parts.data.counts import DataCounts, add
from atropos_exp.parts.data.encode import Encoder
from atropos_exp.parts.data.evalset import read_eval
from atropos_exp.parts.data.mix import Mix, apportion
from atropos_exp.parts.data.quarantine import refuse_too_many_bad, write_quarantine
from atropos_exp.parts.data.settings import DataSettings
from atropos_exp.parts.data.source import RawSource, Source, num_copies, prepare_source, read_source, unique_ids
from atropos_exp.types import Prompt

STATE_VERSION = 2


class AtroposDataLoader:
    """A `PromptLoader`. Equal settings, data, tokenizer and seed give an equal stream.

    Example: after `loader.take(4)` and `state = loader.state()`, a new loader continues with the fifth prompt after
    `restore(state)`, or raises UserError if files, settings or tokenizer have changed.
    """

    def __init__(
        self,
        settings: DataSettings,
        tokenizer: Any,
        *,
        seed: int,
        max_prompt_length: int,
        max_response_length: int,
        run_folder: Path,
        prepared_folder: Path | None = None,
    ) -> None:
        _check_context(tokenizer, max_prompt_length, max_response_length)
        encoder = Encoder(settings, tokenizer)
        cache = Cache(Path(settings.cache))
        held_out = read_eval(settings, prepared_folder, cache)
        raws = [read_source(entry, cache) for entry in settings.sources(prepared_folder)]
        write_quarantine(run_folder, [*raws, *held_out])
        refuse_too_many_bad([*raws, *held_out], settings.max_bad_fraction)

        eval_keys = np.concatenate([raw.keys for raw in held_out]) if held_out else np.empty(0, np.uint64)
        abilities, caps = settings.ability, _caps(raws, settings.max_prompts)
        sources = [
            prepare_source(
                raw,
                encoder,
                cache,
                abilities=abilities,
                excluded=eval_keys,
                max_prompt_length=max_prompt_length,
                cap=cap,
            )
            for raw, cap in zip(raws, caps, strict=True)
        ]
        self._sources, num_renamed = unique_ids(sources)
        self._mix = Mix([len(source) for source in self._sources], settings.weights, seed)
        self._held_out = held_out
        self._cursor = 0
        self._settings: JSON = {
            "seed": seed,
            "max_prompt_length": max_prompt_length,
            "data.weights": settings.weights,
            "data.format": settings.format,
            "data.system_prompt": settings.system_prompt,
            "data.chat_template_arguments": settings.chat_template_arguments,
            "data.ability": list(abilities),
            "data.max_prompts": settings.max_prompts,
        }
        self._prompts_hash = _prompts_hash(self._sources)
        self.counts = DataCounts(
            total=add(source.counts for source in self._sources),
            sources=tuple((source.raw.name, source.counts) for source in self._sources),
            shares=self._mix.shares,
            num_copies=num_copies(np.concatenate([source.of_kept("keys") for source in self._sources])),
            num_eval_rows=len(eval_keys),
            num_eval_copies=num_copies(eval_keys),
            num_eval_quarantined=sum(raw.num_bad for raw in held_out),
            num_renamed_ids=num_renamed,
            notes=tuple(dict.fromkeys(note for raw in [*raws, *held_out] for file in raw.files for note in file.notes)),
        )

    def take(self, num_prompts: int) -> list[Prompt]:
        """The next `num_prompts` prompts of the stream."""
        sources, rows = self._mix.at(self._cursor, num_prompts)
        self._cursor += num_prompts
        return [self._sources[source].prompt(row) for source, row in zip(sources.tolist(), rows.tolist(), strict=True)]

    def state(self) -> JSON:
        """The position, with fingerprints of the stream that it belongs to."""
        return {
            "version": STATE_VERSION,
            "cursor": self._cursor,
            "settings": self._settings,
            "files": [asdict(file) for source in self._sources for file in source.raw.stamps],
            "eval_files": [asdict(file) for raw in self._held_out for file in raw.stamps],
            "prompts_hash": self._prompts_hash,
        }

    def restore(self, state: JSON) -> None:
        """Continue after `state`. Raises UserError that names the file, setting or tokenizer that has changed."""
        now = self.state()
        if state.get("version") != STATE_VERSION:
            raise UserError(
                f"data: the saved position has version {state.get('version')}; this program reads {now['version']}"
            )
        for key, word in (("files", "data file"), ("eval_files", "eval file")):
            _check_files(state[key], now[key], word)
        for name, value in now["settings"].items():
            if state["settings"].get(name) != value:
                raise UserError(
                    f"{name} changed since the checkpoint: was {state['settings'].get(name)!r}, now {value!r}; "
                    "restore it, or start a new run (resume=never)"
                )
        if state["prompts_hash"] != self._prompts_hash:
            raise UserError(
                f"data: equal files now give other token ids (fingerprint was {state['prompts_hash']}, now "
                f"{self._prompts_hash}): the tokenizer or its chat template changed since the checkpoint; "
                "restore it, or start a new run (resume=never)"
            )
        self._cursor = int(state["cursor"])


def _check_files(before: list[dict[str, Any]], now: list[dict[str, Any]], word: str) -> None:
    """Raise UserError unless the contents are equal, in order. Names may differ: a folder may have moved."""
    for old, new in zip(before, now, strict=False):
        if old["content_hash"] != new["content_hash"]:
            moved = "" if old["name"] == new["name"] else f" (then {old['name']})"
            raise UserError(
                f"{word} {new['name']}{moved} changed since the checkpoint: fingerprint was {old['content_hash']} "
                f"({old['num_rows']} rows), now {new['content_hash']} ({new['num_rows']} rows); "
                "put the old file back, or start a new run (resume=never)"
            )
    if len(before) != len(now):
        names = {file["name"] for file in before} ^ {file["name"] for file in now}
        raise UserError(
            f"the run had {len(before)} {word}s at the checkpoint and has {len(now)} now "
            f"(difference: {', '.join(sorted(names)) or 'one is listed several times'}); "
            "restore the list, or start a new run (resume=never)"
        )


def _caps(raws: list[RawSource], max_prompts: int | None) -> list[int | None]:
    """`max_prompts` divided among the sources in proportion to their rows."""
    sizes = [raw.num_rows - raw.num_bad for raw in raws]
    if max_prompts is None or max_prompts >= sum(sizes) or min(sizes) == 0:
        return [max_prompts] * len(raws)
    return list(apportion(max_prompts, sizes))


def _prompts_hash(sources: list[Source]) -> str:
    """A hash of all token ids and prompt ids, in order."""
    import xxhash

    hasher = xxhash.xxh3_128()
    for source in sources:
        hasher.update(source.kept.tobytes())
        hasher.update(source.of_kept("id_hashes").tobytes())
        for tokens in source.tokens:
            hasher.update(tokens.digests())
    return hasher.hexdigest()


def _check_context(tokenizer: Any, max_prompt_length: int, max_response_length: int) -> None:
    """Raise UserError if sequences may exceed the model's context, which some tokenizers give as a huge number."""
    context = getattr(tokenizer, "model_max_length", None)
    if context and max_prompt_length + max_response_length > context:
        raise UserError(
            f"max_prompt_length={max_prompt_length} + max_response_length={max_response_length} is "
            f"{max_prompt_length + max_response_length} tokens, "
            f"more than the tokenizer's model_max_length={int(context)}; lower one of them"
        )
