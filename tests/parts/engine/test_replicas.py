"""Several servers behind one engine: the same answers as one gives, every one proven, a lost one replaced."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atropos_exp.assembly.resync import Resync
from atropos_exp.errors import EngineError, EngineLost, SyncError, UserError
from atropos_exp.parts.engine.servers import Servers
from atropos_exp.parts.engine.update import update
from atropos_exp.processes.ranks import Ranks
from atropos_exp.types import SamplingParams
from atropos_exp.weights.digest import digest
from atropos_exp.weights.publisher import WeightPublisher
from tests.helpers.engines import start_engine
from tests.helpers.random_models import VOCAB, completion_logprobs, random_model, random_prompts

PARAMS = SamplingParams(temperature=1.0, top_p=1.0, top_k=0, max_tokens=6, stop_token_ids=(5,), seed=11)
ALONE = Ranks(rank=0, world_size=1)


class Trainer:
    """Gives the weights of a plain model, and its logprobs."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def parameters(self) -> Iterator[tuple[str, Any]]:
        yield from self.model.named_parameters()

    def logprobs(self, sequences: Any, *, temperature: float) -> list[Any]:
        return [
            completion_logprobs(self.model, sequence[:1], sequence[1:], temperature).astype(np.float32)
            for sequence in sequences
        ]


def manage(trainer: Any, engine: Any) -> WeightPublisher:
    canary = random_prompts([4, 9], seed=5)
    return WeightPublisher(
        trainer,
        engine,
        is_rank_zero=True,
        bucket_bytes=40_000,
        canary=canary,
        temperature=0.8,
        tolerance=1e-4,
        recheck=True,
    )


def start(model_folder: Path, log_folder: Path, **changes: Any) -> Any:
    return start_engine(
        "hf", log_folder, model_folder, max_length=48, data_parallel_size=2, health_timeout_seconds=5.0, **changes
    )


@pytest.fixture(scope="module")
def engines(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    client = start(model_folder, tmp_path_factory.mktemp("replicas"))
    yield client
    client.stop()


@pytest.fixture
def trainer() -> Trainer:
    return Trainer(random_model(seed=3))


def test_the_same_tokens_as_one_server(engines: Servers, engine: Any, model: Any) -> None:
    """Of a request whose prompts are split unevenly, of one prompt, and of none."""
    manage(Trainer(model), engines).publish(engines.version() + 1)  # the weights that `engine` has
    prompts = random_prompts([3, 7, 2, 11, 5], seed=1)
    before = [one.info()["num_rows"] for one in engines.replicas]
    for few in (prompts, prompts[:1]):
        ours, theirs = (one.generate(few, PARAMS, num_samples=3) for one in (engines, engine))
        for mine, other in zip(chain(*ours), chain(*theirs), strict=True):
            assert mine.token_ids.tolist() == other.token_ids.tolist() and mine.finish == other.finish
            np.testing.assert_allclose(mine.logprobs, other.logprobs, atol=1e-5)
    rows = [one.info()["num_rows"] - old for one, old in zip(engines.replicas, before, strict=True)]
    assert rows == [2 * 3, 3 * 3 + 1 * 3]
    assert engines.generate([], PARAMS, num_samples=3) == []
    with pytest.raises(UserError, match="outside the vocabulary"):
        engines.generate([*prompts, np.array([VOCAB], np.int32)], PARAMS, num_samples=1)


def test_every_server_gets_every_bit(engines: Servers, trainer: Trainer) -> None:
    version = engines.version() + 1
    stats = manage(trainer, engines).publish(version)
    expected = {name: digest(tensor) for name, tensor in trainer.model.named_parameters()}
    assert [one.digests() for one in engines.replicas] == [expected, expected]
    assert [one.version() for one in engines.replicas] == [version, version]
    assert stats.digests_compared == stats.num_tensors == len(expected)
    assert stats.num_bytes == sum(tensor.nbytes for tensor in trainer.model.parameters())  # laid down once
    assert stats.canary_gap_max < 1e-5


def test_one_server_with_other_weights_is_found(engines: Servers, trainer: Trainer) -> None:
    """By its digests, and by the canary where they agree."""
    manage(trainer, engines).publish(engines.version() + 1)
    other = random_model(seed=4)
    version = engines.version() + 1
    with update(engines.replicas[1:], engines.transport, version) as receiver:  # behind the engine's back
        receiver.receive(list(other.named_parameters()))
    with pytest.raises(EngineError, match=rf"serve different versions: \[{version - 1}, {version}\]"):
        engines.version()

    class CannotTell:
        """The same engine; what it holds is not asked for, and the second server's weights are not sent again."""

        def __init__(self) -> None:
            self.dtype, self.version, self.replicas = engines.dtype, lambda: version, engines.replicas
            self.transfers_on_device = self.hub_names = False

        @contextmanager
        def updating(self, version: int) -> Iterator[Any]:
            with update(engines.replicas[:1], engines.transport, version) as receiver:
                self.expected, self.receive = receiver.expected, receiver.receive
                yield self

        def digests(self) -> Mapping[str, str]:
            return {}

    with pytest.raises(SyncError, match=r"server 1: canary prompt ., token .* does not serve the trainer's weights"):
        manage(trainer, CannotTell()).publish(version)
    assert manage(trainer, engines).publish(version).policy_version == version

    with pytest.raises(SyncError, match="the engine holds other bits than were sent"), engines.updating(version) as one:
        one.receive(list(trainer.parameters()))
        first = engines.replicas[1]
        kept, first.digests = first.digests, lambda: {**kept(), "model.norm.weight": "0"}  # type: ignore[method-assign]
        try:
            assert one.digests()["model.norm.weight"] == "server 1 differs"
            raise SyncError("the engine holds other bits than were sent")
        finally:
            first.digests = kept  # type: ignore[method-assign]
    for one in engines.replicas:
        with pytest.raises(EngineError, match="weights incomplete"):
            one.check()
    manage(trainer, engines).publish(version)
    engines.check()


@pytest.mark.slow
def test_a_lost_server_is_replaced_and_all_are_synced_again(engines: Servers, trainer: Trainer) -> None:
    resync = Resync(manage(trainer, engines), engines, ALONE, max_restarts=1)
    version = engines.version() + 1
    resync.publish(version)
    prompts = random_prompts([3, 7, 2, 11], seed=1)
    before = engines.generate(prompts, PARAMS, num_samples=2)
    pids = [one.process.pid for one in engines.replicas]
    os.kill(pids[1], signal.SIGKILL)
    with pytest.raises(EngineLost, match="killed by SIGKILL"):
        engines.check()
    after = resync.through(lambda: engines.generate(prompts, PARAMS, num_samples=2))
    assert [[sample.token_ids.tolist() for sample in group] for group in after] == [
        [sample.token_ids.tolist() for sample in group] for group in before
    ]
    now = [one.process.pid for one in engines.replicas]
    assert [old != new for old, new in zip(pids, now, strict=True)] == [False, True]
    assert [one.version() for one in engines.replicas] == [version, version]
    assert (resync.num_restarts, resync.num_syncs, resync.num_verified, resync.num_repeated) == (1, 2, 2, 1)


@pytest.mark.slow
@pytest.mark.parametrize(("transport", "lost"), [("gloo", 0), ("shm+gloo", 0), ("shm+gloo", 1)])
def test_a_server_lost_in_the_middle_of_an_update_to_a_group(
    model_folder: Path, tmp_path: Path, trainer: Trainer, transport: str, lost: int
) -> None:
    """Both get the weights, by one broadcast or each in its own way; the one that is left does not wait for the other,
    and a new group forms."""
    engines = start(model_folder, tmp_path, transport=transport)
    try:
        assert manage(trainer, engines).publish(1).digests_compared == len(list(trainer.parameters()))
        expected = {name: digest(tensor) for name, tensor in trainer.model.named_parameters()}
        assert [one.digests() for one in engines.replicas] == [expected, expected]

        class Kills(Trainer):
            killed = False

            def parameters(self) -> Iterator[tuple[str, Any]]:
                for index, pair in enumerate(super().parameters()):
                    if index == 9 and not self.killed:
                        self.killed = True
                        os.kill(engines.replicas[lost].process.pid, signal.SIGKILL)
                    yield pair

        resync = Resync(manage(Kills(trainer.model), engines), engines, ALONE, max_restarts=2)
        survivor = engines.replicas[1 - lost].process.pid
        assert resync.publish(2).policy_version == 2
        assert (resync.num_restarts, resync.num_syncs, resync.num_verified, resync.num_repeated) == (1, 2, 1, 0)
        assert engines.replicas[1 - lost].process.pid == survivor

        for one in engines.replicas:  # started anew side by side, on the transport that they share
            os.kill(one.process.pid, signal.SIGKILL)
            one.process.child.wait(10)
        assert (resync.publish(3).policy_version, resync.num_restarts) == (3, 2)
        engines.check()
    finally:
        engines.stop()
    assert {path.name for path in tmp_path.iterdir()} == {"engine_0.log", "engine_1.log"}
