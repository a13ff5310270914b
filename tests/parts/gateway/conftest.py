"""The model tiny behind a real engine, and a gateway before it, which the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import yaml

from atropos_exp.config.origin import CONF_DIR
from atropos_exp.parts.engine.hf.settings import HFEngine
from atropos_exp.parts.engine.servers import Servers
from atropos_exp.parts.gateway.client import GatewayClient
from atropos_exp.parts.gateway.settings import GatewaySettings
from atropos_exp.parts.model.tiny import WEIGHTS
from atropos_exp.types import Endpoint, Mask, SamplingParams, TokenIds

MAX_LENGTH = 64
STOP = 1  # <|end|>
CHAT = [3, 21, 22, 15, 23, 24, 33, 4]  # <|user|>12+34=<|assistant|>; the greedy answer is 46<|end|>


def settings(**changes: Any) -> GatewaySettings:
    values = yaml.safe_load((CONF_DIR / "gateway/default.yaml").read_text())
    del values["_target_"]
    return GatewaySettings(**{**values, **changes})


def start_engine(folder: Path, **changes: Any) -> Servers:
    values = yaml.safe_load((CONF_DIR / "engine/hf.yaml").read_text())
    del values["_target_"]
    return HFEngine(**{**values, "num_threads": 1, **changes}).start(
        model_folder=WEIGHTS, device="cpu", log_folder=folder, max_sequence_length=MAX_LENGTH
    )


def start_gateway(
    endpoints: Endpoint | list[Endpoint], folder: Path, *, extra_ports: Any = (), **changes: Any
) -> GatewayClient:
    chosen = settings(**changes)
    doors = chosen.listen(extra_ports)
    try:
        return chosen.start(
            doors=doors,
            endpoints=endpoints if isinstance(endpoints, list) else [endpoints],
            model_folder=WEIGHTS,
            model_name="tiny",
            stop_token_ids=(STOP,),
            max_sequence_length=MAX_LENGTH,
            seed=7,
            log_folder=folder,
        )
    except BaseException:
        doors.close()
        raise


def post(gateway: GatewayClient, path: str, body: Any, **headers: str) -> Any:
    """The answer's JSON. Anything but 200 is a failure."""
    response = ask(gateway, path, body, **headers)
    assert response.status_code == 200, response.text
    return response.json()


def ask(gateway: GatewayClient, path: str, body: Any, **headers: str) -> httpx.Response:
    return httpx.post(gateway.address + path, json=body, headers=headers, trust_env=False, timeout=60)


def params(**changes: Any) -> SamplingParams:
    values: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_tokens": 6, "seed": 1}
    return SamplingParams(**{**values, "stop_token_ids": (STOP,), **changes})


def sequence(prompt: list[int], *parts: tuple[list[int], bool]) -> tuple[TokenIds, Mask]:
    """A prompt, and parts that are trained or not."""
    token_ids = prompt + [token for part, _ in parts for token in part]
    trained = [False] * len(prompt) + [flag for part, flag in parts for _ in part]
    return np.array(token_ids, dtype=np.int32), np.array(trained)


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    client = start_engine(tmp_path_factory.mktemp("engine"))
    yield client
    client.stop()


@pytest.fixture(scope="session")
def gateway(engine: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayClient]:
    client = start_gateway(engine.endpoint, tmp_path_factory.mktemp("gateway"))
    yield client
    client.stop()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(WEIGHTS, local_files_only=True)


@pytest.fixture(scope="session")
def helpers() -> Any:
    """The functions above, for the test files (conftest cannot be imported)."""
    return SimpleNamespace(
        settings=settings,
        start_engine=start_engine,
        start_gateway=start_gateway,
        post=post,
        ask=ask,
        params=params,
        sequence=sequence,
        max_length=MAX_LENGTH,
        stop=STOP,
        chat=CHAT,
        weights=WEIGHTS,
    )
