"""Builders by name, for `data.prepare` of a run's configuration."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atropos_exp.config.typed import Mistake, construct, did_you_mean
from atropos_exp.errors import UserError
from data_prep.builder import Builder, arguments_of
from data_prep.folder import build_into

if TYPE_CHECKING:
    from atropos_exp.parts.data.settings import PrepareSettings

BUILDERS = {
    "arithmetic": "Arithmetic",
    "reasoning_gym": "ReasoningGymTasks",
    "gsm8k": "Gsm8k",
    "math": "Math",
    "hellaswag": "Hellaswag",
}


def find(name: str) -> type[Builder]:
    """The builder class called `name`. Raises UserError that suggests a similar name."""
    if name not in BUILDERS:
        raise UserError(f"builder: got {name!r}, expected {', '.join(BUILDERS)}.{did_you_mean(name, BUILDERS)}")
    builder: type[Builder] = getattr(importlib.import_module(f"data_prep.{name}"), BUILDERS[name])
    return builder


def configure(name: str, arguments: Mapping[str, Any]) -> Builder:
    """The builder with its arguments, where missing ones keep their defaults. Raises UserError with every mistake."""
    cls = find(name)
    mistakes: list[Mistake] = []
    builder: Builder | None = construct(cls, arguments, "arguments", mistakes)
    if builder is None:
        raise UserError("\n".join(f"{mistake.path}: {mistake.message}" for mistake in mistakes))
    return builder


def preflight(prepare: PrepareSettings) -> list[str]:
    """What is wrong with `data.prepare`, one message each. It builds nothing."""
    try:
        configure(prepare.builder, prepare.arguments)
    except UserError as error:
        return [f"data.prepare.{line}" for line in str(error).splitlines()]
    return []


def ensure(prepare: PrepareSettings, *, deadline_s: float = 1800.0, say: Callable[[str], None] = print) -> Path:
    """The folder with train.parquet and test.parquet, built inside `prepare.folder` unless it is there already.

    Each choice of builder, version and arguments has a folder of its own, so runs of a sweep never disturb each other.
    Raises UserError if it cannot be built, was changed, or another process builds it for longer than `deadline_s`.
    """
    import xxhash

    builder = configure(prepare.builder, prepare.arguments)
    identity = json.dumps([builder.NAME, builder.VERSION, arguments_of(builder)], sort_keys=True)
    target = Path(prepare.folder).expanduser() / f"{builder.NAME}-{xxhash.xxh3_64_hexdigest(identity.encode())[:10]}"
    build_into(target, builder, deadline_s=deadline_s, say=say)
    return target
