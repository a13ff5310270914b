"""Real SGLang in a process of its own, on a CPU: see stand_ins/README.md."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from atropos_exp.parts.engine.servers import Servers
from atropos_exp.parts.engine.sglang import settings as sglang
from tests.helpers.engines import start_random
from tests.helpers.paths import ROOT
from tests.helpers.random_models import random_model

torch.set_num_threads(1)
PYTHON = ROOT / ".venv-sglang-cpu" / "bin" / "python"
MAX_LENGTH = 300
ON_CPU = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "disable_cuda_graph": True,
    "max_running_requests": 64,
    "max_total_tokens": 16_384,  # else a share of the machine's memory
}


def start_sglang(
    folder: Path, model: Any, *, faults: Path | None = None, num_ranks: int = 1, **settings: Any
) -> Servers:
    """`faults`: files in it turn on the faults of `cpu_server.py`. `num_ranks`: processes that share the model."""
    cores = sorted(os.sched_getaffinity(0))
    paths = [Path(__file__).parent / "stand_ins", os.environ.get("PYTHONPATH", "")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sglang.SGLangEngine, "engine_arguments", lambda _: {**ON_CPU, "tp_size": num_ranks})
        if num_ranks > 1:
            bound = "|".join(str(cores[rank % len(cores)]) for rank in range(num_ranks))
            patch.setenv("SGLANG_CPU_OMP_THREADS_BIND", bound)
        patch.setenv("SGLANG_USE_CPU_ENGINE", "1")
        patch.setenv("PYTHONPATH", os.pathsep.join(str(path) for path in paths if str(path)))
        patch.setattr(sglang, "SERVER", "tests.sglang.cpu_server")
        patch.setenv("SGLANG_FAULTS", str(faults or folder / "no_faults"))
        # As a shell does with a background job. SGLang must end all the same when a process of it fails.
        usual = signal.signal(signal.SIGQUIT, signal.SIG_IGN)
        try:
            return start_random("sglang", folder, model, max_length=MAX_LENGTH, python=str(PYTHON), **settings)
        finally:
            signal.signal(signal.SIGQUIT, usual)


@pytest.fixture(scope="session")
def start() -> Callable[..., Servers]:
    return start_sglang


@pytest.fixture(scope="session")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="session")
def model() -> Any:
    return random_model()


@pytest.fixture(scope="session")
def engine(model: Any, faults: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """Serves `model` until a test publishes another one. Without a fault turned on it is the real server."""
    client = start_sglang(tmp_path_factory.mktemp("sglang"), model, faults=faults)
    yield client
    client.stop()
