"""The small twin of an architecture of which only the configuration is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from atropos_exp.parts.model.twin import make_twin


def write_twin(folder: Path, model_type: str, *, max_length: int = 8192, **config: Any) -> Path:
    """Write the configuration to `folder` and its twin below, whose folder is returned."""
    CONFIG_MAPPING[model_type](**config).save_pretrained(folder)
    return make_twin(folder, folder / "twin", max_length=max_length, trust_remote_code=False)
