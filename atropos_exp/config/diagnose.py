"""Hydra stops at the first override that it cannot apply. This finds all of them, and says it in our words."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from atropos_exp.config.origin import Origin, report
from atropos_exp.config.root import GROUPS, OLD_KEYS
from atropos_exp.config.sources import Sources
from atropos_exp.config.typed import Mistake, did_you_mean, unknown_key

COMPOSE_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError)


Check = Callable[[DictConfig], list[Mistake]]


def diagnose(error: Exception, overrides: Sequence[str], sources: Sources, *, check: Check) -> str:
    """The message for the user after `error` stopped the composition of `overrides`: every mistake, or `error` itself.

    `check` finds the mistakes of what can be composed (`assembly.check.mistakes_of`).
    """
    try:
        with sources.opened():
            text = _diagnose(overrides, sources, check)
    except (*COMPOSE_ERRORS, ValueError) as other:
        return _first_lines(other)
    return text or _first_lines(error)


def _diagnose(texts: Sequence[str], sources: Sources, check: Check) -> str:
    mistakes: list[Mistake] = []
    parsed = []
    spaced = [text for text in _joined(texts) if re.search(r"^[^'\"]*\s=|^[\w.@/+~]+=\s", text)]
    for text in spaced:
        compact = re.sub(r"\s*=\s*", "=", text, count=1)
        mistakes.append(Mistake(path="", message=f"cannot read '{text}'; write it without spaces: {compact}"))
    for text in [] if spaced else texts:
        try:
            parsed.append((text, OverridesParser.create().parse_override(text)))
        except HydraException:
            message = f"cannot read the override '{text}'; expected key=value (quote values with , : = or spaces)"
            mistakes.append(Mistake(path="", message=message))

    base = sources.compose([], with_hydra=True)
    loader = GlobalHydra.instance().config_loader()
    groups, values = [], []
    for text, override in parsed:
        name = override.key_or_group
        own = {file.stem for folder in sources.folders for file in (folder / name).glob("*.yaml")}
        options = sorted(own.union(loader.get_group_options(name)))
        if override.is_add() and (_has(base, name) or name in ("experiment", *GROUPS)):
            message = f"it is there already: write it without the '+', as '{text.lstrip('+')}'"
            mistakes.append(Mistake(path=name, message=message))
        elif options:
            unknown = [option for option in _chosen(override) if option not in options]
            if unknown:
                message = f"unknown option '{unknown[0]}'.{did_you_mean(unknown[0], options)} There are: "
                mistakes.append(Mistake(path=name, message=message + ", ".join(options)))
            elif not override.is_sweep_override():
                groups.append(text)
        else:
            values.append((text, override))

    composed = sources.compose(groups, with_hydra=True) if groups else base
    kept = []
    for text, override in values:
        key = override.key_or_group
        if override.is_add() or override.is_force_add() or _has(composed, key):
            if not override.is_sweep_override() and not override.is_hydra_override():
                kept.append(text)
        elif key in OLD_KEYS:
            mistakes.append(Mistake(path=key, message=f"it is now {OLD_KEYS[key]}"))
        else:
            mistakes.append(unknown_key(key, _paths(composed)))
    if not mistakes:
        return ""
    config = sources.compose([*groups, *kept])
    mistakes.extend(check(config))
    choices = {group: option for group, option in composed.hydra.runtime.choices.items() if option}
    origin = Origin(overrides=tuple(texts), choices=choices, folders=sources.folders, name=sources.name)
    return report(mistakes, origin)


def _joined(texts: Sequence[str]) -> list[str]:
    """The words of a command line, with those that belong together but for spaces around an "=" joined by a space."""
    joined: list[str] = []
    for text in texts:
        if joined and (text.startswith("=") or (joined[-1].endswith("=") and "=" not in text)):
            joined[-1] += f" {text}"
        else:
            joined.append(text)
    return joined


def _chosen(override: Override) -> Iterable[str]:
    """The options that a group override names; Hydra itself cannot take null."""
    if override.is_delete():
        return []
    if override.is_sweep_override():
        return list(override.sweep_string_iterator())
    value: Any = override.value()
    return ["null" if item is None else str(item) for item in (value if isinstance(value, list) else [value])]


def _has(config: DictConfig, key: str) -> bool:
    """Whether a dotted key stands in the composed configuration, a null counting as there."""
    node: Any = config
    for name in key.split("."):
        if OmegaConf.is_dict(node) and name in node:
            node = node._get_node(name)
        elif OmegaConf.is_list(node) and name.isdigit() and int(name) < len(node):
            node = node._get_node(int(name))
        else:
            return False
    return True


def _paths(config: DictConfig) -> list[str]:
    """Every dotted key of ours, and the groups."""

    def walk(values: Any, prefix: str) -> Iterable[str]:
        for key, item in values.items() if isinstance(values, dict) else ():
            yield prefix + str(key)
            yield from walk(item, f"{prefix}{key}.")

    plain: Any = OmegaConf.to_container(config, resolve=False)
    found = [path for key, item in plain.items() if key != "hydra" for path in walk({key: item}, "")]
    return [path for path in [*found, *GROUPS, "experiment"] if not path.endswith("._target_")]


def _first_lines(error: BaseException) -> str:
    """Hydra's own words, and those of its cause, without the lines that only repeat where in Hydra it happened."""
    lines: list[str] = []
    current: BaseException | None = error
    while current is not None:
        for line in str(current).splitlines():
            if line.strip() and not line.strip().startswith(("full_key:", "object_type=")) and line not in lines:
                lines.append(line.rstrip())
        current = current.__cause__
    return "\n  ".join(["Wrong configuration:", *lines])
