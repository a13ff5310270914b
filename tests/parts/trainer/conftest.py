"""Fixtures of the trainer's tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import trainer_cases


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen2 with tied embeddings."""
    return trainer_cases.write_model(tmp_path_factory.mktemp("tied"))


@pytest.fixture(scope="session")
def untied_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trainer_cases.write_model(tmp_path_factory.mktemp("untied"), tied=False)


@pytest.fixture
def start(model_folder: Path, tmp_path: Path) -> Callable[..., Any]:
    """start(**settings) -> trainer of the tiny model; bad batches go to tmp_path / "dumps"."""

    def _start(folder: Path | None = None, **changes: Any) -> Any:
        return trainer_cases.start(folder or model_folder, tmp_path / "dumps", **changes)

    return _start
