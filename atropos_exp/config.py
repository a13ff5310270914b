"""The configuration: facts that parts share, and `build`, which turns one YAML node into a checked frozen object."""

from __future__ import annotations

import dataclasses
import importlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from omegaconf import DictConfig, OmegaConf

from atropos_exp.config_typed import Mistake, Ranges, check_ranges, construct
from atropos_exp.types import UserError

PACKAGE = "atropos_exp"
# Every group that becomes a part. `experiment` and `sweeps` only choose among these.
GROUPS = (
    *("model", "data", "reward", "rollout", "atropos", "env", "gateway", "engine"),
    *("advantage", "loss", "trainer", "cluster", "logger", "eval"),
)
FOLDERS = {"env": "atropos"}  # where a group's code is, if not in a folder of its name


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    every: int  # steps; 0: only the last
    keep: int  # newest ones kept

    RANGES: ClassVar[Ranges] = {
        "every": (lambda steps: steps >= 0, "0 (only the last) or more"),
        "keep": (lambda count: count >= 1, "at least 1"),
    }

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncConfig:
    bucket_mb: int  # MiB
    canary_prompts: int
    tolerance: float | None  # nats; None: by the engine's dtype

    RANGES: ClassVar[Ranges] = {
        "bucket_mb": (lambda size: 1 <= size <= 65536, "1 to 65536 MiB"),
        "canary_prompts": (lambda count: count >= 1, "at least 1: every sync is proven"),
        "tolerance": (lambda gap: gap is None or 0 <= gap < math.inf, "nats of 0 or more, or null (by dtype)"),
    }

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """The root of the configuration less its groups; `conf/config.yaml` explains each key."""

    name: str
    seed: int
    device: str  # auto | cpu | cuda
    batch_size: int  # prompts per step
    group_size: int  # rollouts per prompt
    max_prompt_length: int  # tokens
    max_response_length: int  # tokens
    temperature: float
    top_p: float
    top_k: int
    output_dir: str
    run_dir: str | None
    resume: str  # auto | never | path
    checkpoint: CheckpointConfig
    sync: SyncConfig

    RANGES: ClassVar[Ranges] = {
        "name": (
            lambda name: re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) is not None,
            "letters, digits, '.', '_' or '-' (it names a folder)",
        ),
        "seed": (lambda seed: 0 <= seed < 2**31, "0 to 2147483647"),
        "device": (lambda device: device in ("auto", "cpu", "cuda"), "auto, cpu or cuda"),
        "batch_size": (lambda count: count >= 1, "at least 1"),
        "group_size": (lambda count: count >= 1, "at least 1"),
        "max_prompt_length": (lambda length: length >= 1, "at least 1"),
        "max_response_length": (lambda length: length >= 1, "at least 1"),
        # greedy rollouts of one prompt would all be equal; comparisons are false for NaN
        "temperature": (lambda value: 0 < value <= 10, "above 0 and at most 10"),
        "top_p": (lambda share: 0 < share <= 1, "above 0 and at most 1 (1 = off)"),
        "top_k": (lambda count: count >= 0, "0 (off) or more"),
        "output_dir": (lambda folder: folder != "", "a folder"),
        "run_dir": (lambda folder: folder != "", "a folder, or null"),
        "resume": (lambda how: how != "", "auto, never or a path"),
    }

    def __post_init__(self) -> None:
        check_ranges(self)


def build(node: Mapping[str, Any] | DictConfig, group: str = "") -> Any:
    """The settings object that `node._target_` names, made of the node's other keys.

    Unlike `hydra.utils.instantiate`, a value of the wrong type is an error, as are unknown and missing keys; nothing
    outside this package is ever imported or called. Raises UserError with every mistake, one a line.
    """
    mistakes: list[Mistake] = []
    part = build_into(mistakes, _plain(node), group)
    if mistakes:
        raise UserError("\n".join(f"{mistake.path}: {mistake.message}".lstrip(": ") for mistake in mistakes))
    return part


def build_into(mistakes: list[Mistake], values: Mapping[str, Any], group: str) -> Any:
    """Like `build`, but appends to `mistakes` and returns None if it did."""
    path = f"{group}._target_" if group else "_target_"
    try:
        cls = find_class(values.get("_target_"), group)
    except UserError as error:
        mistakes.append(Mistake(path=path, message=str(error)))
        return None
    return construct(cls, {key: value for key, value in values.items() if key != "_target_"}, group, mistakes)


def find_class(target: object, group: str = "") -> type:
    """The settings class of this package that a `_target_` names. Raises UserError for anything else."""
    inside = f"{PACKAGE}.{FOLDERS.get(group, group)}." if group else f"{PACKAGE}."
    if not isinstance(target, str) or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", target):
        raise UserError(f"got {target!r}, expected {inside}<file>.<Class>")
    if not target.startswith(inside):
        raise UserError(f"got {target!r}, expected a class inside {inside[:-1]}: others are refused")
    module_name, _, class_name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), class_name, None)
    except ModuleNotFoundError as error:
        if error.name and module_name.startswith(error.name):
            raise UserError(f"got {target!r}, but there is no module {error.name}") from error
        raise
    if not isinstance(found, type) or not dataclasses.is_dataclass(found):
        raise UserError(f"got {target!r}, which is not a dataclass")
    if f"{found.__module__}.{found.__qualname__}" != target:
        raise UserError(f"got {target!r}, which is another name of {found.__module__}.{found.__qualname__}")
    return found


def _plain(node: Mapping[str, Any] | DictConfig) -> Mapping[str, Any]:
    if isinstance(node, DictConfig):
        return OmegaConf.to_container(node, resolve=True, throw_on_missing=True)  # type: ignore[return-value]
    return node
