"""A configuration as one run of a sweep will use it, whatever becomes of the YAML files that it was composed from."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from atropos_exp.config_save import config_hash


def without_sweep(config: DictConfig) -> DictConfig:
    """A copy without the nodes that are none of a run's business."""
    plain: Any = OmegaConf.to_container(config, resolve=False)
    kept = OmegaConf.create({key: item for key, item in plain.items() if key not in ("hydra", "sweep")})
    assert isinstance(kept, DictConfig)
    return kept


def freeze(config: DictConfig, run_folder: Path) -> tuple[str, str]:
    """`config` as YAML, resolved, for a run in `run_folder` that continues there when it is started again; and its
    hash, which is not that of `config`: folders that it derived from `output_dir` are now plain values."""
    own = copy.deepcopy(config)
    with read_write(own), open_dict(own):
        own.run_dir = str(run_folder)
        own.resume = "auto"
    text = OmegaConf.to_yaml(own, resolve=True)
    read_back = OmegaConf.create(text)
    assert isinstance(read_back, DictConfig)
    assert OmegaConf.to_container(read_back) == OmegaConf.to_container(own, resolve=True), "lost in YAML"
    return text, config_hash(read_back)
