"""A tiny random model, and one server of it that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from atropos_exp.parts.engine.servers import Servers
from tests.helpers.engines import start_engine
from tests.helpers.random_models import random_model


@pytest.fixture(scope="session")
def model() -> Any:
    return random_model()


@pytest.fixture(scope="session")
def model_folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def engine(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    client = start_engine("hf", tmp_path_factory.mktemp("log"), model_folder, max_length=48, batching_wait_seconds=0.05)
    yield client
    client.stop()
