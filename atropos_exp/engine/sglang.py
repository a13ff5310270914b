"""`engine=sglang`: a SGLang server in its own environment. This version looks for it and does not drive it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from atropos_exp.engine.external import environment_problems
from atropos_exp.types import UserError


@dataclass(frozen=True, kw_only=True)
class SGLangEngine:
    """Settings of `engine=sglang`."""

    python: str | None

    def preflight(self, *, device: str) -> list[str]:
        """What stands in the way of `start`, one sentence each, found without starting a server."""
        return environment_problems(option="sglang", module="sglang", title="SGLang", python=self.python)

    def start(self, *, model_folder: Path, device: str, log_folder: Path, max_sequence_length: int) -> NoReturn:
        """Raises UserError: there is no client for SGLang here yet."""
        raise UserError("engine=sglang is not driven by this version of atropos_exp; use engine=hf")
