"""Weights from one GPU to an engine on another over NCCL; over Gloo where GPU_TESTS_DEVICE=cpu tries the test."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from atropos_exp.assembly.resync import Resync
from atropos_exp.errors import SyncError
from atropos_exp.processes.ranks import Ranks
from atropos_exp.types import Floats, TokenIds
from atropos_exp.weights.digest import digest
from tests.helpers.engines import start_random
from tests.helpers.faulty_lines import SQUARE, TransposesOne
from tests.helpers.publishing import manage
from tests.helpers.random_models import random_model

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]


class Trainer:
    """A model on the first GPU."""

    def __init__(self, model: Any, device: str) -> None:
        self.model = model.to(device)

    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.model.named_parameters()

    def logprobs(self, sequences: Sequence[TokenIds], *, temperature: float) -> list[Floats]:
        scored = []
        for sequence in sequences:
            ids = torch.tensor(sequence.astype(np.int64), device=self.model.device)[None]
            with torch.inference_mode():
                logprobs = torch.log_softmax(self.model(input_ids=ids).logits[0, :-1].float() / temperature, -1)
            scored.append(logprobs.gather(1, ids[0, 1:, None])[:, 0].cpu().numpy())
        return scored


def test_weights_reach_an_engine_on_another_gpu(device: str, tmp_path: Path) -> None:
    """Proven bucket by bucket, a fault on the line is caught, and a server killed in the middle is whole again."""
    where: dict[str, Any] = {"transport": "gloo"}
    if device == "cuda":
        if torch.cuda.device_count() < 2:
            pytest.skip("needs two NVIDIA GPUs")
        where = {"transport": "nccl", "gpus": [1]}
    engine = start_random("hf", tmp_path, random_model(), max_length=32, device=device, **where)
    try:
        assert engine.transfers_on_device == (device == "cuda")
        trainer = Trainer(random_model(seed=1), device)
        for version, bucket_bytes in ((1, 1), (2, 40_000), (3, 1 << 30)):
            stats = manage(trainer, engine, bucket_bytes=bucket_bytes, tolerance=None).publish(version)
            assert engine.replicas[0].digests() == {name: digest(tensor) for name, tensor in trainer.parameters()}
            assert stats.digests_compared == stats.num_tensors

        with pytest.raises(SyncError, match=f"other bits than were sent of {SQUARE} "):
            manage(trainer, TransposesOne(engine), tolerance=None).publish(4)

        class Kills(Trainer):
            killed = False

            def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
                for index, pair in enumerate(super().parameters()):
                    if index == 5 and not self.killed:
                        self.killed = True
                        os.kill(engine.replicas[0].process.pid, signal.SIGKILL)
                    yield pair

        kills = Kills(trainer.model, device)
        publisher = manage(kills, engine, bucket_bytes=1, tolerance=None)
        resync = Resync(publisher, engine, Ranks(rank=0, world_size=1), max_restarts=1)
        assert resync.publish(4).policy_version == 4
        assert (resync.num_restarts, resync.num_verified) == (1, 1)
        engine.check()
    finally:
        engine.stop()


def test_an_engine_may_name_the_gpu_of_the_trainer(device: str, tmp_path: Path) -> None:
    if device != "cuda":
        pytest.skip("needs an NVIDIA GPU")
    engine = start_random("hf", tmp_path, random_model(), max_length=32, device=device, transport="cuda_ipc", gpus=[0])
    try:
        trainer = Trainer(random_model(seed=1), device)
        assert manage(trainer, engine, tolerance=None).publish(1).digests_compared > 0
        assert engine.replicas[0].digests() == {name: digest(tensor) for name, tensor in trainer.parameters()}
    finally:
        engine.stop()


def test_weights_reach_one_server_beside_the_trainer_and_one_elsewhere(device: str, tmp_path: Path) -> None:
    """Each in its own way, proven for both; the one beside the trainer is killed and whole again."""
    where: dict[str, Any] = {"transport": "shm+gloo"}
    if device == "cuda":
        if torch.cuda.device_count() < 2:
            pytest.skip("needs two NVIDIA GPUs")
        where = {"transport": "cuda_ipc+nccl", "gpus": [0, 1]}
    engine = start_random("hf", tmp_path, random_model(), max_length=32, device=device, data_parallel_size=2, **where)
    try:
        assert engine.transfers_on_device == (device == "cuda")
        trainer = Trainer(random_model(seed=1), device)
        expected = {name: digest(tensor) for name, tensor in trainer.parameters()}
        for version, bucket_bytes in ((1, 1), (2, 40_000), (3, 1 << 30)):
            stats = manage(trainer, engine, bucket_bytes=bucket_bytes, tolerance=None).publish(version)
            assert stats.digests_compared == stats.num_tensors
        assert [one.digests() for one in engine.replicas] == [expected, expected]

        os.kill(engine.replicas[0].process.pid, signal.SIGKILL)
        engine.replicas[0].process.child.wait(10)
        resync = Resync(manage(trainer, engine, tolerance=None), engine, Ranks(rank=0, world_size=1), max_restarts=1)
        assert resync.publish(4).policy_version == 4
        engine.check()
    finally:
        engine.stop()
