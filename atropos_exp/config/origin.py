"""Where a configuration key got its value: a command-line override, or a line of a YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from atropos_exp.config.typed import Mistake

_HERE = Path(__file__).resolve().parents[1]
# In a wheel conf/ lies inside the package, in a checkout beside it.
CONF_DIR = next((path for path in (_HERE / "conf", _HERE.parent / "conf") if path.is_dir()), _HERE.parent / "conf")


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """What a configuration was composed from."""

    overrides: tuple[str, ...]  # of the command line, in order
    choices: Mapping[str, str]  # group -> chosen option
    folders: tuple[Path, ...]  # searched for <group>/<option>.yaml, in order
    name: str = "config"  # of the file that Hydra reads first

    @classmethod
    def current(cls) -> Origin:
        """Of the Hydra application that is running, else of the shipped conf/ without overrides."""
        if not HydraConfig.initialized():
            return cls(overrides=(), choices={}, folders=(CONF_DIR,))
        hydra = HydraConfig.get()
        overrides: Any = OmegaConf.to_container(hydra.overrides.task, resolve=False)
        return cls(
            overrides=tuple(overrides),
            choices={group: option for group, option in hydra.runtime.choices.items() if option},
            folders=tuple(Path(source.path) for source in hydra.runtime.config_sources if source.schema == "file"),
            name=str(hydra.job.config_name).removesuffix(".yaml"),
        )

    def of(self, path: str) -> str:
        """Such as "override 'seed=x'" or "conf/loss/gspo.yaml line 3"; for a missing key the file it belongs to."""
        keys = {override.split("=", 1)[0].lstrip("+~").split("@")[0]: override for override in self.overrides}
        if path in keys:
            return f"override '{keys[path]}'"
        for key, override in reversed(list(keys.items())):
            above = path.startswith(key + ".") and key not in self.choices  # `loss=gspo` sets no value inside loss
            if above or key.startswith(path + "."):
                return f"override '{override}'"
        group, _, rest = path.partition(".")
        fallback = ""
        for name, option in reversed(list(self.choices.items())):
            if name.startswith("hydra/") or (file := self._find(f"{name}/{option}.yaml")) is None:
                continue
            inner = rest if name == group else path if _is_global(file) else None
            if inner is None:
                continue
            if line := _line(file, inner):
                return f"{_shown(file)} line {line}"
            if name == group:
                fallback = _shown(file)
        root = self._find(f"{self.name}.yaml")
        if root is not None and (line := _line(root, path)):
            return f"{_shown(root)} line {line}"
        belongs = root is not None and (not rest or _line(root, group))
        return fallback or (_shown(root) if root is not None and belongs else "")

    def _find(self, name: str) -> Path | None:
        return next((folder / name for folder in self.folders if (folder / name).is_file()), None)


def _is_global(file: Path) -> bool:
    return "@package _global_" in file.read_text(encoding="utf-8")[:200]


def _line(file: Path, path: str) -> int:
    """Line of a dotted key in a YAML file, counted from 1; 0 if it is not there."""
    node = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    line = 0
    for name in path.split(".") if path else []:
        if isinstance(node, yaml.MappingNode):
            found = [(key, value) for key, value in node.value if key.value == name]
        elif isinstance(node, yaml.SequenceNode) and name.isdigit() and int(name) < len(node.value):
            found = [(node.value[int(name)],) * 2]
        else:
            return 0
        if not found:
            return 0
        line, node = found[-1][0].start_mark.line + 1, found[-1][1]
    return line


def _shown(file: Path) -> str:
    """Short: relative to the folder that holds conf/, or to a --config-dir."""
    conf = next((folder for folder in file.parents if folder.name == "conf"), None)
    return str(file.relative_to(conf.parent)) if conf else str(file)


def report(mistakes: list[Mistake], origin: Origin) -> str:
    """One line per mistake: key, what is wrong, where it was set."""
    placed = [(mistake, origin.of(mistake.path) if mistake.path else "") for mistake in mistakes]
    lines = list(dict.fromkeys(f"{mistake} [{place}]" if place else str(mistake) for mistake, place in placed))
    if len(lines) == 1:
        return f"Wrong configuration: {lines[0]}"
    return "\n  ".join([f"Wrong configuration, {len(lines)} mistakes:", *lines])
