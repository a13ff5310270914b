"""A real Atropos API for the tests of this folder."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from atropos_exp.parts.atropos.client import ApiDown, AtroposClient
from atropos_exp.processes.child import Child
from atropos_exp.processes.ports import HeldPort

START_SECONDS = 90.0


class Api:
    """`run-api` on a free loopback port, which it keeps over `kill` and `start`."""

    def __init__(self, folder: Path) -> None:
        self._held = HeldPort()
        self.port = self._held.number
        self.url = f"http://127.0.0.1:{self.port}"
        self._folder = folder
        self.client = AtroposClient(self.url, batch_seconds=120.0)

    def start(self) -> None:
        self.child = Child(
            [sys.executable, "-m", "atroposlib.cli.run_api", "--host", "127.0.0.1", "--port", str(self.port)],
            log=self._folder / "api.log",
            environment=dict(os.environ),
        )
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                self.client.check()
                return
            except ApiDown:
                assert self.child.poll() is None and time.monotonic() < deadline, self.child.state()
                time.sleep(0.05)

    def kill(self) -> None:
        self.child.stop()

    def post(self, path: str, body: Any) -> Any:
        import httpx

        return httpx.post(f"{self.url}{path}", json=body, timeout=30.0).json()


@pytest.fixture(scope="module")
def api_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    api = Api(tmp_path_factory.mktemp("api"))
    api.start()
    yield api
    api.kill()
    api.client.close()


@pytest.fixture
def api(api_process: Api) -> Api:
    """The process of the module, as if it had just started."""
    if api_process.child.poll() is not None:
        api_process.start()
    import httpx

    httpx.get(f"{api_process.url}/reset_data", timeout=30.0)
    return api_process
