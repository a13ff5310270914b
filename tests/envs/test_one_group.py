"""What one group costs the environment's only thread: it reads no file, and is not packed for a short way."""

from __future__ import annotations

import asyncio
import gzip
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from atropos_exp.envs.single_turn import SingleTurnEnv
from atropos_exp.envs.stream import StreamPosition
from atropos_exp.parts.model.tiny import WEIGHTS

Make = Callable[..., SingleTurnEnv]
GROUP = {"tokens": [[17] * 2000], "scores": [1.0]}  # long enough for atroposlib to pack it


@pytest.fixture
def make(write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Make:
    def environment(*overrides: str, **settings: Any) -> SingleTurnEnv:
        path = write_config(*overrides)
        monkeypatch.setattr("sys.argv", ["single_turn", "serve", "--env.run_config", str(path)])
        config, servers = SingleTurnEnv.config_init()
        return SingleTurnEnv(config.model_copy(update=settings), servers)

    return environment


@pytest.fixture
def received() -> Iterator[tuple[int, list[tuple[str | None, Any]]]]:
    """(port, (content encoding, body as parsed) of every call) of a server that takes anything."""
    calls: list[tuple[str | None, Any]] = []

    class Taker(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body, encoding = self.rfile.read(int(self.headers["content-length"])), self.headers["content-encoding"]
            calls.append((encoding, json.loads(gzip.decompress(body) if encoding == "gzip" else body)))
            self.send_response(200)
            self.end_headers()

    with HTTPServer(("127.0.0.1", 0), Taker) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port, calls
        server.shutdown()


def test_sampling_parameters_need_no_file(make: Make, tmp_path: Path) -> None:
    """The tokenizer of a large model is megabytes of JSON: a tenth of a second for every group, once."""
    folder = tmp_path / "model"
    shutil.copytree(WEIGHTS, folder)
    environment = make(f"model.path={folder}")
    before = environment.training_params(StreamPosition(position=0, seed=1))
    shutil.rmtree(folder)
    assert environment.training_params(StreamPosition(position=0, seed=1)) == before
    assert before.stop_token_ids


def test_a_group_for_an_api_on_this_machine_is_not_packed(make: Make, received: Any) -> None:
    port, calls = received
    for host in ("127.0.0.1", "localhost"):
        environment = make(rollout_server_url=f"http://{host}:{port}")
        asyncio.run(environment._send_scored_data_to_api(dict(GROUP)))
    assert calls == [(None, {**GROUP, "env_id": None})] * 2


def test_a_group_for_another_machine_is_packed(make: Make, received: Any) -> None:
    """This machine under an address that others may have as well."""
    port, calls = received
    environment = make(rollout_server_url=f"http://0.0.0.0:{port}")
    asyncio.run(environment._send_scored_data_to_api(dict(GROUP)))
    assert calls == [("gzip", {**GROUP, "env_id": None})]
