"""Where a command line's YAML files are: `--config-path`, `--config-name`, `--config-dir`, for one run and for many."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hydra import compose, version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from atropos_exp.config.origin import CONF_DIR
from atropos_exp.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Sources:
    """The folders in which Hydra looks for a file, and the name of the first one."""

    path: Path = CONF_DIR  # --config-path: instead of the shipped conf/
    name: str = "config"  # --config-name
    own: Path | None = None  # --config-dir: searched before `path`

    @classmethod
    def of(cls, arguments: Namespace) -> Sources:
        """Those that the command line names, seen from the working directory. Raises UserError for no folder."""
        for flag, given in (("--config-path", arguments.config_path), ("--config-dir", arguments.config_dir)):
            if given is not None and not Path(given).expanduser().is_dir():
                raise UserError(f"Wrong configuration: {flag} {given}: not found: there is no such folder")
        return cls(
            path=_folder(arguments.config_path) or CONF_DIR,
            name=(arguments.config_name or "config").removesuffix(".yaml"),
            own=_folder(arguments.config_dir),
        )

    @property
    def folders(self) -> tuple[Path, ...]:
        """All of them, in the order in which they are searched."""
        return (self.path,) if self.own is None else (self.own, self.path)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Let Hydra search here in this block."""
        search_path = create_config_search_path(str(self.path))
        if self.own is not None:  # as Hydra's own command line does it
            search_path.prepend("command-line", self.own.as_uri(), SearchPathQuery(provider="schema", path=None))
        version.setbase("1.3")
        GlobalHydra.instance().clear()
        Hydra.create_main_hydra2(task_name="atropos_exp", config_search_path=search_path)
        try:
            yield
        finally:
            GlobalHydra.instance().clear()

    def compose(self, overrides: Sequence[str], *, with_hydra: bool = False) -> DictConfig:
        """What Hydra makes of `overrides`; only inside `opened`."""
        return compose(self.name, overrides=list(overrides), return_hydra_config=with_hydra)


def _folder(text: str | None) -> Path | None:
    return None if text is None else Path(text).expanduser().resolve()
