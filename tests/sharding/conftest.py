"""A trainer that is honest but does not train, a tiny random model, and servers to publish to."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from atropos_exp.config_origin import CONF_DIR
from atropos_exp.engine.client import EngineClient
from atropos_exp.engine.hf import HFEngine
from atropos_exp.sharding.manager import ShardingManager
from atropos_exp.types import Floats, TokenIds, TrainBatch, UpdateStats

sys.path.insert(0, str(Path(__file__).parent))  # puts `faulty_lines` within reach of the tests beside it

VOCAB = 48
CANARY = [np.random.default_rng(5).integers(0, VOCAB, size=length).astype(np.int32) for length in (4, 9, 6)]


def random_model(*, tied: bool, seed: int, positions: int = 64) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()


class HeldModel:
    """A `PolicyTrainer` over a plain transformers model whose "update" is whatever the test does to it."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.num_given = 0

    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self.model.named_parameters():
            self.num_given += 1
            yield name, parameter

    def logprobs(self, sequences: Sequence[TokenIds], *, temperature: float) -> list[Floats]:
        scored = []
        for sequence in sequences:
            token_ids = torch.tensor(sequence[None, :].astype(np.int64))
            with torch.inference_mode():
                logprobs = torch.log_softmax(self.model(input_ids=token_ids).logits[0, :-1] / temperature, dim=-1)
            scored.append(logprobs.gather(1, token_ids[0, 1:, None])[:, 0].numpy())
        return scored

    def disturb(self, scale: float = 0.05) -> None:
        """Every weight changes, as by an update."""
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter += scale * torch.randn_like(parameter)

    def update(self, batch: TrainBatch) -> UpdateStats:
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        raise NotImplementedError

    def load(self, folder: Path) -> None:
        raise NotImplementedError


def start(folder: Path, model: Any, *, device: str = "cpu", **changes: Any) -> EngineClient:
    model.save_pretrained(folder / "model")
    values = yaml.safe_load((CONF_DIR / "engine/hf.yaml").read_text())
    del values["_target_"]
    settings = HFEngine(**{**values, "num_threads": 1, "dtype": "float32", **changes})
    return settings.start(model_folder=folder / "model", device=device, log_folder=folder, max_sequence_length=32)


def manage(trainer: Any, engine: Any, **changes: Any) -> ShardingManager:
    values: dict[str, Any] = {"bucket_bytes": 40_000, "canary": CANARY, "temperature": 0.8, "tolerance": 1e-4}
    return ShardingManager(trainer, engine, is_rank_zero=True, **{**values, **changes})


@pytest.fixture(scope="session")
def helpers() -> Any:
    return SimpleNamespace(
        random_model=random_model, HeldModel=HeldModel, start=start, manage=manage, canary=CANARY, vocab=VOCAB
    )


@pytest.fixture(scope="session")
def tied_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineClient]:
    client = start(tmp_path_factory.mktemp("tied"), random_model(tied=True, seed=0))
    yield client
    client.stop()
