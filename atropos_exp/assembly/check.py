"""`validate`: everything that can be known to be wrong with a run before it starts, in one message."""

import copy
import importlib.metadata
import inspect
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from atropos_exp.assembly.parts import Parts, lacking
from atropos_exp.assembly.sizes import Sizes, check_sizes
from atropos_exp.config.build import build_into
from atropos_exp.config.origin import Origin, report
from atropos_exp.config.root import GROUPS, OLD_KEYS, RunConfig
from atropos_exp.config.settings import Settings
from atropos_exp.config.typed import Mistake, construct, located, unknown_key
from atropos_exp.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """A configuration without mistakes."""

    run: RunConfig
    parts: Parts
    sizes: Sizes
    device: str  # cpu | cuda
    config: DictConfig  # as composed; interpolations are kept

    @property
    def falls_back(self) -> bool:
        """Whether local rollouts take over while Atropos gives none: only where they are of the same kind."""
        return self.parts.rollout.falls_back and self.parts.env.fallback

    @property
    def max_sequence_length(self) -> int:
        """Tokens of a prompt and its answer; a whole conversation of an environment has at most as many."""
        return self.run.max_prompt_length + self.run.max_response_length


def validate(config: DictConfig, origin: Origin | None = None) -> Checked:
    """Build every part and check it against the others. Raises UserError that lists every mistake with its place."""
    origin = origin or Origin.current()
    checked, mistakes = check(config)
    if checked is None:
        raise UserError(report(mistakes, origin))
    return checked


def mistakes_of(config: DictConfig) -> list[Mistake]:
    """All that `check` finds wrong."""
    return check(config)[1]


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

    shared = set(RunConfig.model_fields)
    for key in [key for key in values if key not in shared and key not in GROUPS]:
        mistakes.append(_unknown_root_key(key, values, shared))
    run = construct(RunConfig, {key: values[key] for key in values if key in shared}, "", mistakes)
    parts = {}
    for group in GROUPS:
        if not isinstance(values.get(group), dict):
            mistakes.append(Mistake(path=group, message="it needs one of its options"))
        elif (part := build_into(mistakes, values[group], group)) is not None:
            if lack := lacking(group, part):
                mistakes.append(Mistake(path=group, message=lack))
            else:
                parts[group] = part
    if run is None:
        return None, mistakes

    cluster, rollout, atropos = parts.get("cluster"), parts.get("rollout"), parts.get("atropos")
    # Where a job is submitted says nothing of the machines that it will run on.
    elsewhere = None if cluster is None or "WORLD_SIZE" in os.environ else cluster.target_device
    device = _device(run.device, elsewhere, mistakes)
    sizes = check_sizes(
        run, cluster, parts.get("trainer"), parts.get("advantage"),
        device=device, environ=os.environ, mistakes=mistakes,
    )  # fmt: skip
    uses_atropos = rollout is not None and rollout.uses_atropos
    facts = {
        **{name: getattr(run, name) for name in shared},
        "device": device,
        "world_size": sizes.world_size,
        "lora": parts["model"].lora if "model" in parts else None,
        "uses_atropos": uses_atropos,
        "launches_atropos": uses_atropos and atropos is not None and atropos.launch,
    }
    for group, part in parts.items():
        mistakes.extend(_preflight(group, part, facts))
    if mistakes:
        return None, mistakes
    return Checked(run=run, parts=Parts(**parts), sizes=sizes, device=device, config=copy.deepcopy(config)), []


def _missing(values: Any, path: str = "") -> list[str]:
    if values == "???":
        return [path]
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    return [found for key, item in items for found in _missing(item, f"{path}.{key}" if path else str(key))]


def _unknown_root_key(key: str, values: Mapping[str, Any], shared: Iterable[str]) -> Mistake:
    if key in OLD_KEYS:
        return Mistake(path=key, message=f"it is now {OLD_KEYS[key]}")
    nested = [f"{group}.{name}" for group in (*GROUPS, "checkpoint", "sync") for name in values.get(group) or ()]
    return unknown_key(key, [*sorted(shared), *GROUPS, *(name for name in nested if not name.endswith("._target_"))])


def _device(wanted: str, elsewhere: str | None, mistakes: list[Mistake]) -> str:
    """Which device `torch` will see, without importing it: here, or on a machine that has `elsewhere`."""
    for_cpu = importlib.metadata.version("torch").endswith("+cpu")
    if elsewhere is None:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1")
        visible = not hidden and any(Path("/dev").glob("nvidia[0-9]*"))
        if wanted == "cuda" and not visible:
            mistakes.append(Mistake(path="device", message="got cuda, but no NVIDIA GPU is visible; use device=auto"))
        elif wanted == "cuda" and for_cpu:
            mistakes.append(Mistake(path="device", message="got cuda, but the installed PyTorch is a CPU build"))
        elsewhere = "cuda" if visible else "cpu"
    return wanted if wanted != "auto" else "cpu" if for_cpu else elsewhere


def _preflight(group: str, part: Settings, facts: Mapping[str, Any]) -> list[Mistake]:
    """The problems that the part itself finds: `preflight(...)`, if it has one, names the facts that it wants."""
    if not hasattr(part, "preflight"):
        return []
    wanted = [name for name in inspect.signature(part.preflight).parameters if name in facts]
    try:
        problems = list(part.preflight(**{name: facts[name] for name in wanted}) or ())
    except UserError as error:
        problems = [str(error)]
    return [mistake for text in problems for mistake in located(text, type(part), group)]
