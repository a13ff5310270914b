"""Servers to publish to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest

from atropos_exp.parts.engine.servers import Servers
from tests.helpers.engines import start_random
from tests.helpers.random_models import random_model

start_hf = partial(start_random, "hf", max_length=32)


@pytest.fixture(scope="session")
def start() -> Callable[..., Servers]:
    return start_hf


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    client = start_hf(tmp_path_factory.mktemp("tied"), random_model())
    yield client
    client.stop()
