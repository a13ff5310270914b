"""Processes on the GPUs of this machine, or on its CPU where GPU_TESTS_DEVICE=cpu asks to try the tests themselves.

The trainer runs in processes of its own: verl takes one device per process, and other tests take the CPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from atropos_exp.processes.ports import HeldPort
from tests.gpu import gpu_cases

HERE = Path(__file__).parent


class Processes:
    """Starts `gpu_cases.py` and waits for it; every process ends with the fixture."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._running: list[tuple[subprocess.Popen[bytes], Path]] = []
        self._ports: list[HeldPort] = []

    def start(self, device: str, *ways: str, num_ranks: int = 1) -> None:
        self._ports.append(HeldPort())
        for rank in range(num_ranks):
            environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), *_python_path()])}
            if device == "cpu":
                environment["CUDA_VISIBLE_DEVICES"] = ""
            if num_ranks > 1:
                environment |= {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(num_ranks),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(self._ports[-1].number),
                }
            log_path = self.folder / f"{ways[0]}_{device}_{rank}.log"
            command = [sys.executable, str(HERE / "gpu_cases.py"), str(self.folder), device, *ways]
            with log_path.open("wb") as log:
                process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
            self._running.append((process, log_path))

    def finish(self) -> None:
        """Wait for all that run; raise with the end of their logs if one failed or took too long."""
        try:
            for process, _ in self._running:
                process.wait(timeout=400)
        finally:
            codes = [process.poll() for process, _ in self._running]
            logs = "\n".join(f"== {path.name}\n{path.read_text()[-1500:]}" for _, path in self._running)
            self.stop()
        if any(codes):
            pytest.fail(f"exit codes {codes}: {logs.strip().splitlines()[-1]}\n{logs}", pytrace=False)

    def stop(self) -> None:
        for process, _ in self._running:
            process.kill()
            process.wait()
        self._running = []

    def case(self, way: str, device: str, name: str, rank: int = 0) -> dict[str, Any]:
        """What a rank has measured; fails with the error that it met."""
        content: dict[str, Any] = json.loads((self.folder / f"{way}_{device}_{rank}.json").read_text())[name]
        if error := content.get("error"):
            pytest.fail(f"{way} on {device}: {error.strip().splitlines()[-1]}\n{error[-1500:]}", pytrace=False)
        return content


def _python_path() -> list[str]:
    return [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]


@pytest.fixture(scope="session")
def device() -> str:
    return "cpu" if os.environ.get("GPU_TESTS_DEVICE") == "cpu" else "cuda"


@pytest.fixture(scope="session")
def one_rank(tmp_path_factory: pytest.TempPathFactory, device: str) -> Iterator[Processes]:
    """`whole` has run on one GPU and `exact` on the CPU."""
    folder = tmp_path_factory.mktemp("gpu")
    gpu_cases.write_models(folder)
    processes = Processes(folder)
    try:
        processes.start("cpu", "exact")
        processes.start(device, "whole")
        processes.finish()
        yield processes
    finally:
        processes.stop()


@pytest.fixture(scope="session")
def two_ranks(one_rank: Processes, device: str) -> Processes:
    """Beside `one_rank`: two GPUs have shared the batch, then the sequences, and continued what one had saved; then
    one GPU has continued what the two had saved."""
    if device == "cuda":
        import torch

        if torch.cuda.device_count() < 2:
            pytest.skip("needs two NVIDIA GPUs")
    one_rank.start(device, "data", "sequence", "resumed_whole", num_ranks=2)
    one_rank.finish()
    one_rank.start(device, "resumed_data", "resumed_sequence")
    one_rank.finish()
    return one_rank
