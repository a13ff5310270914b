"""From a node of the configuration to the settings object that its `_target_` names."""

import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from atropos_exp.config.settings import Settings
from atropos_exp.config.typed import Mistake, SettingsError, construct
from atropos_exp.errors import UserError

PACKAGE = "atropos_exp"
FOLDERS = {"env": "parts.atropos", "sweep": "sweep"}  # where a group's code is, if not in a folder of its name
# Folders of the package before they moved to parts/; runs and sweeps that were begun then name classes in them.
MOVED = ("advantage", "atropos", "cluster", "data", "engine", "eval", "gateway", "logger", "loss", "model", "reward",
         "rollout", "trainer")  # fmt: skip


def build(node: Mapping[str, Any] | DictConfig, group: str = "") -> Any:
    """The settings object that `node._target_` names, made of the node's other keys.

    Unlike `hydra.utils.instantiate`, a value of the wrong type is an error, as are unknown and missing keys; nothing
    outside this package is ever imported or called. Raises UserError with every mistake, one a line.
    """
    mistakes: list[Mistake] = []
    values: Any = node
    if isinstance(node, DictConfig):
        values = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    part = build_into(mistakes, values, group)
    if mistakes:
        raise SettingsError(mistakes)
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


def refuse_moved(nodes: Mapping[str, Any], path: Path) -> None:
    """Raise UserError if the file `path`, with the groups `nodes` in it, names a class where it no longer is."""
    for group, node in nodes.items():
        target = node.get("_target_") if isinstance(node, Mapping | DictConfig) else None
        if problem := _moved(target):
            raise UserError(f"{path}: {group}._target_: {problem}")


def _moved(target: object) -> str:
    """What to say of a class of before the parts moved into `atropos_exp.parts`; "" for any other."""
    if not isinstance(target, str) or not re.match(rf"{PACKAGE}\.({'|'.join(MOVED)})\.", target):
        return ""
    return (
        f"got {target!r}: this configuration was written before the parts moved to {PACKAGE}.parts, and this version "
        "cannot continue it. Start a new run, or continue this one with the version that wrote it"
    )


def find_class(target: object, group: str = "") -> type[Settings]:
    """The settings class of this package that a `_target_` names. Raises UserError for anything else."""
    inside = f"{PACKAGE}.{FOLDERS.get(group, f'parts.{group}')}." if group else f"{PACKAGE}."
    if not isinstance(target, str) or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", target):
        raise UserError(f"got {target!r}, expected {inside}<file>.<Class>")
    if not target.startswith(inside):
        if problem := _moved(target):
            raise UserError(problem)
        raise UserError(f"got {target!r}, expected a class inside {inside[:-1]}: others are refused")
    module_name, _, class_name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), class_name, None)
    except ModuleNotFoundError as error:
        if error.name and module_name.startswith(error.name):
            raise UserError(f"got {target!r}, but there is no module {error.name}") from error
        raise
    if not isinstance(found, type) or not issubclass(found, Settings):
        raise UserError(f"got {target!r}, which is not a class of settings")
    if f"{found.__module__}.{found.__qualname__}" != target:
        raise UserError(f"got {target!r}, which is another name of {found.__module__}.{found.__qualname__}")
    return found
