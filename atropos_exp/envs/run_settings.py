"""The part of a run's configuration that environments need, read from config.yaml in the run folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from atropos_exp.config.build import build_into
from atropos_exp.config.root import RunConfig
from atropos_exp.config.typed import Mistake, construct
from atropos_exp.errors import UserError
from atropos_exp.parts.data.verl import VerlData
from atropos_exp.parts.eval.held_out import HeldOut
from atropos_exp.parts.model.settings import ModelSettings
from atropos_exp.parts.reward.base import PooledReward

GROUPS = ("model", "data", "reward", "eval")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSettings:
    """The part of a run's configuration that its environments share with its trainer."""

    run: RunConfig
    model: ModelSettings
    data: VerlData
    reward: PooledReward
    eval: HeldOut
    mask_truncated: bool

    @classmethod
    def read(cls, path: Path) -> RunSettings:
        """Read a resolved configuration. Raises UserError that lists every mistake in the part that is used."""
        values = read_yaml(path, "env.run_config")
        if not isinstance(values, dict):
            raise UserError(f"env.run_config: {path} is no configuration; give config.yaml of a run folder")
        mistakes: list[Mistake] = []
        shared = {key: item for key, item in values.items() if key in RunConfig.model_fields}
        run = construct(RunConfig, shared, "", mistakes)
        parts = {}
        for group in GROUPS:
            if isinstance(values.get(group), Mapping):
                parts[group] = build_into(mistakes, values[group], group)
            else:
                mistakes.append(Mistake(path=group, message="missing: it needs one of its options"))
        rollout = values.get("rollout")
        mask_truncated = rollout.get("mask_truncated") if isinstance(rollout, Mapping) else None
        if not isinstance(mask_truncated, bool):
            mistakes.append(Mistake(path="rollout.mask_truncated", message=f"got {mask_truncated!r}, expected a bool"))
        if mistakes:
            lines = [f"{mistake.path}: {mistake.message}" for mistake in mistakes]
            raise UserError("\n  ".join([f"{path} is not the configuration of a run of this version:", *lines]))
        assert isinstance(mask_truncated, bool)
        return cls(run=run, mask_truncated=mask_truncated, **parts)

    def model_folder(self) -> Path:
        """The model's folder, for its tokenizer: the copy that the trainer fetched, or a new download."""
        folder = self.model.local_folder()
        return folder if folder is not None and folder.is_dir() else self.model.fetch()


def read_yaml(path: Path, key: str) -> Any:
    """The contents of the file that the flag `key` names. Raises UserError if it cannot be read."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{key}: {path} cannot be read: {error}") from error
