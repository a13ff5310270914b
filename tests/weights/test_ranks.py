"""Two ranks: only the first talks to the engine, and whatever happens happens to both.

The ranks run this file as a program.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from tests.helpers.paths import ROOT

FAULTS = ("nothing", "receive", "stale", "trainer", "adapter")  # the last is none
CANARY = [np.array([1, 2, 3], dtype=np.int32)]


class MemoryEngine:
    """An honest engine of one matrix: the logprob of token b after token a is log_softmax(matrix)[a, b]."""

    dtype = "float32"
    transfers_on_device = False

    def __init__(self, fails_at: str) -> None:
        import torch

        self.fails_at = fails_at
        self.weights = {"matrix": torch.zeros(4, 4), "unused": torch.zeros(3)}
        self.served = 0
        self.hub_names = False

        if fails_at == "adapter":  # not a fault: it asks for the base once, then for the matrices of rank 1 alone
            self.weights |= {"matrix.lora_A.weight": torch.zeros(1, 4), "matrix.lora_B.weight": torch.zeros(4, 1)}

    @property
    def replicas(self) -> list[MemoryEngine]:
        return [self]

    @contextlib.contextmanager
    def updating(self, version: int) -> Iterator[MemoryEngine]:
        yield self
        self.served = version

    def expected(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        only = ".lora_" if self.served and self.fails_at == "adapter" else ""
        return {name: ("float32", tuple(tensor.shape)) for name, tensor in self.weights.items() if only in name}

    def receive(self, bucket: Sequence[tuple[str, Any]]) -> None:
        if self.fails_at == "receive":
            raise ConnectionError("no route to the engine")
        for name, tensor in bucket:
            self.weights[name].copy_(tensor)
        if self.fails_at == "stale":
            self.weights["matrix"].zero_()

    def digests(self) -> Mapping[str, str]:
        return {}

    def version(self) -> int:
        return self.served

    def score(self, sequences: Any, *, temperature: float) -> list[Any]:
        matrix = self.weights["matrix"]
        if self.fails_at == "adapter":
            matrix = matrix + self.weights["matrix.lora_B.weight"] @ self.weights["matrix.lora_A.weight"]
        return score(matrix, sequences, temperature)


def score(matrix: Any, sequences: Any, temperature: float) -> list[Any]:
    import torch

    logprobs = torch.log_softmax(matrix / temperature, dim=-1).numpy()
    return [logprobs[sequence[:-1], sequence[1:]] for sequence in sequences]


class ShardedTrainer:
    """Half of every tensor on each rank; to give it out is collective, as with FSDP."""

    def __init__(self, fails_at: str, rank: int) -> None:
        self.fails = fails_at == "trainer" and rank == 1
        self.adapts = fails_at == "adapter"
        self.num_given = 0

    def parameters(self) -> Iterator[tuple[str, Any]]:
        yield from self._give({"matrix": (4, 4), "unused": (3,)})
        if self.fails:
            raise RuntimeError("rank 1 has lost its shard")

    def adapter(self, *, with_base: bool) -> Iterator[tuple[str, Any]]:
        if with_base:
            yield from self.parameters()
        yield from self._give({"matrix.lora_A.weight": (1, 4), "matrix.lora_B.weight": (4, 1)})

    def _give(self, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Any]]:
        for name, shape in shapes.items():
            yield name, self._gather(shape)
            self.num_given += 1

    def _gather(self, shape: tuple[int, ...]) -> Any:
        import torch
        import torch.distributed as dist

        size = int(np.prod(shape))
        full = torch.linspace(-1, 1, size)
        full[torch.arange(size) % 2 != dist.get_rank()] = 0.0
        dist.all_reduce(full)
        return full.view(shape)

    def logprobs(self, sequences: Any, *, temperature: float) -> list[Any]:
        matrix = self._gather((4, 4))
        if self.adapts:
            matrix = matrix + self._gather((4, 1)) @ self._gather((1, 4))
        return score(matrix, sequences, temperature)


def main(rank: int, meeting: str) -> None:
    """One rank: a sync under each fault of FAULTS, its outcome printed as a line."""
    import torch.distributed as dist

    from atropos_exp.weights.publisher import WeightPublisher

    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    for fails_at in FAULTS:
        trainer: Any = ShardedTrainer(fails_at, rank)
        engine: Any = MemoryEngine(fails_at) if rank == 0 else None
        publisher = WeightPublisher(
            trainer,
            engine,
            is_rank_zero=rank == 0,
            bucket_bytes=8,
            canary=CANARY,
            temperature=0.5,
            tolerance=1e-5,
            recheck=True,
        )
        try:
            outcome = f"{publisher.publish(3)} {publisher.num_verified} of {publisher.num_syncs}"
            if fails_at == "adapter":
                outcome = f"{publisher.publish(4)} {publisher.num_verified} of {publisher.num_syncs}"
        except Exception as error:  # the outcome that the test reads
            outcome = f"{type(error).__name__}: {error}"
        print(json.dumps({"outcome": outcome, "given": trainer.num_given}))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Fault -> what each of the two ranks saw."""
    meeting = str(tmp_path_factory.mktemp("ranks") / "meeting")
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), meeting],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        lines = [output.splitlines() for output in [process.communicate(timeout=120)[0] for process in ranks]]
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
    return {fault: [json.loads(rank[index]) for rank in lines] for index, fault in enumerate(FAULTS)}


def test_two_ranks_share_one_outcome(outcomes: Any) -> None:
    zero, one = outcomes["nothing"]
    assert zero == one and zero["given"] == 2
    assert "policy_version=3, num_tensors=2, num_bytes=76" in zero["outcome"] and zero["outcome"].endswith(" 1 of 1")


def test_both_ranks_gather_what_the_engine_asks_for(outcomes: Any) -> None:
    zero, one = outcomes["adapter"]
    assert zero == one and zero["given"] == 4 + 2
    assert "policy_version=4, num_tensors=2, num_bytes=32" in zero["outcome"] and zero["outcome"].endswith(" 2 of 2")


@pytest.mark.parametrize(
    ("fault", "rank", "what", "own"),
    [
        ("receive", 0, "the weight sync", "ConnectionError: no route to the engine"),
        (
            "stale",
            0,
            "the proof of the weight sync",
            "SyncError: canary prompt 0, token 2: the engine gives -1.386294 nats and",
        ),
        ("trainer", 1, "the weight sync", "RuntimeError: rank 1 has lost its shard"),
    ],
)
def test_a_failure_of_either_rank_reaches_both(outcomes: Any, fault: str, rank: int, what: str, own: str) -> None:
    assert [outcome["given"] for outcome in outcomes[fault]] == [2, 2]
    assert outcomes[fault][rank]["outcome"].startswith(own)
    expected = f"SyncError: {what} to version 3 failed on rank {rank}: {own}"
    assert outcomes[fault][1 - rank]["outcome"].startswith(expected)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
