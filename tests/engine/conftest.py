"""A tiny random model, decoders over it, and one server that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from atropos_exp.config_origin import CONF_DIR
from atropos_exp.engine.client import EngineClient
from atropos_exp.engine.hf import HFEngine
from atropos_exp.types import TokenIds

VOCAB = 48
MAX_LENGTH = 48


def random_model(*, tied: bool = True, kind: str = "qwen2", seed: int = 0) -> Any:
    """Two layers, head size 64, two query heads on one key head; weights large enough that tokens differ."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if kind == "mistral":
        sizes["sliding_window"] = 4
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **sizes)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()


def random_prompts(lengths: list[int], seed: int = 0) -> list[TokenIds]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, VOCAB, size=length).astype(np.int32) for length in lengths]


def teacher_forced(model: Any, prompt: TokenIds, completion: TokenIds, temperature: float) -> np.ndarray[Any, Any]:
    """Logprobs of the completion's tokens from one plain forward pass over the whole sequence."""
    import torch

    sequence = torch.tensor(np.concatenate([prompt, completion])[None, :].astype(np.int64))
    with torch.inference_mode():
        logits = model(input_ids=sequence).logits[0].double() / temperature
    logprobs = torch.log_softmax(logits, dim=-1)
    start = len(prompt) - 1
    picked = [float(logprobs[start + index, token]) for index, token in enumerate(completion.tolist())]
    return np.array(picked)


@pytest.fixture(scope="session")
def model() -> Any:
    return random_model()


@pytest.fixture(scope="session")
def model_folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


def settings(**changes: Any) -> HFEngine:
    values = yaml.safe_load((CONF_DIR / "engine/hf.yaml").read_text())
    del values["_target_"]
    return HFEngine(**{**values, "num_threads": 1, **changes})


@pytest.fixture(scope="session")
def engine(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineClient]:
    client = settings(batching_wait_seconds=0.05).start(
        model_folder=model_folder,
        device="cpu",
        log_folder=tmp_path_factory.mktemp("log"),
        max_sequence_length=MAX_LENGTH,
    )
    yield client
    client.stop()


@pytest.fixture(scope="session")
def helpers() -> Any:
    """The functions above, for the test files (conftest cannot be imported)."""
    from types import SimpleNamespace

    return SimpleNamespace(
        random_model=random_model,
        random_prompts=random_prompts,
        teacher_forced=teacher_forced,
        settings=settings,
        vocab=VOCAB,
        max_length=MAX_LENGTH,
    )
