"""`validate`: everything that can be known to be wrong with a run before it starts, in one message."""

from __future__ import annotations

import copy
import importlib.metadata
import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from atropos_exp.config.build import build_into
from atropos_exp.config.origin import Origin
from atropos_exp.config.root import GROUPS, RunConfig
from atropos_exp.config.sizes import Sizes, check_sizes
from atropos_exp.config.typed import Mistake, construct, located, unknown_key
from atropos_exp.errors import UserError

# Keys of earlier versions and of the papers' scripts -> what to type instead.
OLD_KEYS = {
    "use_gpro": "advantage=grpo",
    "use_grpo": "advantage=grpo",
    "gpro_epsilon": "advantage.epsilon",
    "grpo_epsilon": "advantage.epsilon",
    "gpro_norm_by_std": "advantage.norm_by_std",
    "grpo_norm_by_std": "advantage.norm_by_std",
    "advantage_normalization": "advantage.normalization (none or batch)",
    "advantage_clipping": "advantage.clip ([low, high] or null)",
    "use_advantage_weighting": "loss=advantage_weighted_sft",
    "model_path": "model.path",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """A configuration without mistakes."""

    run: RunConfig
    parts: Mapping[str, Any]  # group -> its settings object
    sizes: Sizes
    device: str  # cpu | cuda
    config: DictConfig  # as composed; interpolations are kept


def validate(config: DictConfig, origin: Origin | None = None) -> Checked:
    """Build every part and check it against the others. Raises UserError that lists every mistake with its place."""
    origin = origin or Origin.current()
    checked, mistakes = check(config)
    if checked is None:
        raise UserError(report(mistakes, origin))
    return checked


def report(mistakes: list[Mistake], origin: Origin) -> str:
    """One line per mistake: key, what is wrong, where it was set."""
    lines = []
    for mistake in mistakes:
        place = origin.of(mistake.path) if mistake.path else ""
        text = f"{mistake.path}: {mistake.message}" if mistake.path else mistake.message
        line = f"{text} [{place}]" if place else text
        if line not in lines:
            lines.append(line)
    if len(lines) == 1:
        return f"Wrong configuration: {lines[0]}"
    return "\n  ".join([f"Wrong configuration, {len(lines)} mistakes:", *lines])


def check(config: DictConfig) -> tuple[Checked | None, list[Mistake]]:
    """Like `validate`, but returns the mistakes."""
    mistakes: list[Mistake] = []
    try:
        values: Any = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        return None, [Mistake(path=error.full_key or "", message=str(error.msg or error).splitlines()[0])]
    values.pop("sweep", None)  # of the command that starts many runs; no run has it
    for path in _missing(values):
        mistakes.append(Mistake(path=path, message="missing: it needs a value"))
    if mistakes:
        return None, mistakes

    shared = {field.name for field in fields(RunConfig)}
    for key in [key for key in values if key not in shared and key not in GROUPS]:
        mistakes.append(_unknown_root_key(key, values, shared))
    run = construct(RunConfig, {key: values[key] for key in values if key in shared}, "", mistakes)
    parts = {}
    for group in GROUPS:
        if not isinstance(values.get(group), dict):
            mistakes.append(Mistake(path=group, message="it needs one of its options"))
        elif (part := build_into(mistakes, values[group], group)) is not None:
            parts[group] = part
    if run is None:
        return None, mistakes

    # Where a job is submitted says nothing of the machines that it will run on.
    elsewhere = None if "WORLD_SIZE" in os.environ else getattr(parts.get("cluster"), "target_device", None)
    device = _device(run.device, mistakes) if elsewhere is None else _wanted(run.device, elsewhere)
    sizes = check_sizes(run, parts, device, os.environ, mistakes)
    uses_atropos = bool(getattr(parts.get("rollout"), "uses_atropos", False))
    facts = {
        **_facts(run),
        "device": device,
        "world_size": sizes.world_size,
        "lora": getattr(parts.get("model"), "lora", None),
        "uses_atropos": uses_atropos,
        "launches_atropos": uses_atropos and bool(getattr(parts.get("atropos"), "launch", False)),
    }
    for group, part in parts.items():
        mistakes.extend(_preflight(group, part, facts))
    if mistakes:
        return None, mistakes
    return Checked(run=run, parts=parts, sizes=sizes, device=device, config=copy.deepcopy(config)), []


def _missing(values: Any, path: str = "") -> list[str]:
    if values == "???":
        return [path]
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    return [found for key, item in items for found in _missing(item, f"{path}.{key}" if path else str(key))]


def _unknown_root_key(key: str, values: Mapping[str, Any], shared: set[str]) -> Mistake:
    if key in OLD_KEYS:
        return Mistake(path=key, message=f"it is now {OLD_KEYS[key]}")
    nested = [f"{group}.{name}" for group in (*GROUPS, "checkpoint", "sync") for name in values.get(group) or ()]
    return unknown_key(key, [*sorted(shared), *GROUPS, *(name for name in nested if not name.endswith("._target_"))])


def _facts(run: RunConfig) -> dict[str, Any]:
    return {field.name: getattr(run, field.name) for field in fields(run)}


def _device(wanted: str, mistakes: list[Mistake]) -> str:
    """Which device `torch` will see, without importing it."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1")
    visible = not hidden and any(Path("/dev").glob("nvidia[0-9]*"))
    for_cpu = importlib.metadata.version("torch").endswith("+cpu")
    if wanted == "cuda" and not visible:
        mistakes.append(Mistake(path="device", message="got cuda, but no NVIDIA GPU is visible; use device=auto"))
    elif wanted == "cuda" and for_cpu:
        mistakes.append(Mistake(path="device", message="got cuda, but the installed PyTorch is a CPU build"))
    if wanted != "auto":
        return wanted
    return "cuda" if visible and not for_cpu else "cpu"


def _wanted(wanted: str, elsewhere: str) -> str:
    """The device on another machine that has `elsewhere`, under a PyTorch like this one's."""
    for_cpu = importlib.metadata.version("torch").endswith("+cpu")
    return wanted if wanted != "auto" else "cpu" if for_cpu else elsewhere


def _preflight(group: str, part: Any, facts: Mapping[str, Any]) -> list[Mistake]:
    """What the part itself finds: `preflight(...)` yields problems and names the shared facts it wants."""
    method = getattr(part, "preflight", None)
    if method is None:
        return []
    wanted = [name for name in inspect.signature(method).parameters if name in facts]
    try:
        problems = list(method(**{name: facts[name] for name in wanted}) or ())
    except UserError as error:
        problems = [str(error)]
    return [mistake for text in problems for mistake in located(UserError(text), type(part), group)]
