"""Weights that are sent to a process group: proven, bounded, and whole again after a loss in the middle of a bucket."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from atropos_exp.assembly.resync import Resync
from atropos_exp.errors import EngineError, SyncError
from atropos_exp.parts.engine.servers import Servers
from atropos_exp.processes.ranks import Ranks
from atropos_exp.weights.digest import digest
from atropos_exp.weights.group import Group, GroupError, GroupSource, Transfer, store_file
from tests.helpers.faulty_lines import SQUARE, TransposesOne
from tests.helpers.paths import ROOT
from tests.helpers.publishing import HeldModel, manage
from tests.helpers.random_models import random_model

ALONE = Ranks(rank=0, world_size=1)


@pytest.fixture(scope="module")
def engine(start: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    model = random_model(seed=0)
    client = start(tmp_path_factory.mktemp("gloo"), model, transport="gloo", health_timeout_seconds=3.0)
    yield client
    client.stop()


def test_weights_arrive_bit_for_bit(engine: Servers) -> None:
    trainer = HeldModel(random_model(seed=1))
    for bucket_bytes in (1, 40_000, 1 << 30):  # a tensor a bucket, some, all in one: a longer one than before
        trainer.disturb()
        version = engine.version() + 1
        stats = manage(trainer, engine, bucket_bytes=bucket_bytes).publish(version)
        parameters = dict(trainer.model.named_parameters())
        assert engine.replicas[0].digests() == {name: digest(tensor) for name, tensor in parameters.items()}
        assert stats.num_tensors == stats.digests_compared == len(parameters)
        assert stats.canary_gap_max < 1e-5


def test_a_fault_on_the_line_is_caught(engine: Servers) -> None:
    trainer = HeldModel(random_model(seed=2))
    version = engine.version() + 1
    with pytest.raises(SyncError, match=rf"other bits than were sent of {SQUARE} \(1 tensors differ\)"):
        manage(trainer, TransposesOne(engine)).publish(version)
    with pytest.raises(EngineError, match="weights incomplete"):
        engine.check()
    manage(trainer, engine).publish(version)
    engine.check()


def test_a_refused_bucket_leaves_nobody_waiting(engine: Servers) -> None:
    trainer = HeldModel(random_model(seed=2))
    version = engine.version() + 1
    name, tensor = next(iter(trainer.parameters()))
    began = time.monotonic()
    with pytest.raises(EngineError, match=f"{name} sent twice"), engine.updating(version) as receiver:
        receiver.receive([(name, tensor)])
        receiver.receive([(name, tensor)])
    assert time.monotonic() - began < 20
    manage(trainer, engine).publish(version)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["kill", "stop"])
def test_a_server_lost_in_the_middle_of_a_bucket(engine: Servers, number: int) -> None:
    """It has been told of the bucket and has not read it: the sender is not left waiting for it."""
    trainer = HeldModel(random_model(seed=3))
    manage(trainer, engine).publish(engine.version() + 1)  # the group exists

    class Loses:
        """Ends the server as the second bucket begins to move."""

        def __init__(self) -> None:
            self.num_sent = 0

        def __call__(self, buffer: Any) -> None:
            self.num_sent += 1
            if self.num_sent == 2:
                os.kill(engine.replicas[0].process.pid, number)

    loses = Loses()
    resync = Resync(manage(trainer, engine, bucket_bytes=1), engine, ALONE, max_restarts=1)
    with pytest.MonkeyPatch.context() as patch:
        start = Group.start

        def start_and_lose(self: Group, buffer: Any) -> Transfer:
            loses(buffer)
            return start(self, buffer)

        patch.setattr(Group, "start", start_and_lose)
        trainer.disturb()
        began = time.monotonic()
        version = engine.version() + 1
        assert resync.publish(version).policy_version == version
    assert time.monotonic() - began < 60
    assert (resync.num_restarts, resync.num_syncs, resync.num_verified) == (1, 2, 1)
    engine.check()


def test_members_that_cannot_talk_are_told_why() -> None:
    source = GroupSource(backend="nccl", store="/dev/null", first_rank=1)
    place = {"name": "x", "size": 2, "nccl": [2, 99, 1], "torch": "9.9"}
    with pytest.raises(Exception, match=r"the trainer has NCCL 2\.99\.1 \(torch 9\.9\) and this engine NCCL .*shm or "):
        source.receive(place, 8, receiver=0)


def test_a_receiver_does_not_wait_for_a_sender_that_gave_up() -> None:
    import torch

    store = f"/proc/{os.getpid()}/fd/{store_file()}"
    sender, receiver = (Group(backend="gloo", store=store, name="a", rank=rank, size=2) for rank in (0, 1))
    transfer = receiver.start(torch.zeros(8, dtype=torch.uint8))
    threading.Timer(0.3, sender.abandon).start()
    began = time.monotonic()
    with pytest.raises(GroupError, match="the sender gave the group up"):
        transfer.wait(60, while_wanted=True)
    assert time.monotonic() - began < 5


@pytest.mark.slow
def test_a_server_lost_for_good_and_the_end_of_its_process(tmp_path: Path) -> None:
    """The loss is named and the engine stopped at once; then the descriptors of its group are used for something else,
    and the process ends with exit code 0."""
    code = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from tests.helpers.engines import start_random\n"
        "from tests.helpers.publishing import HeldModel, manage\n"
        "from tests.helpers.random_models import random_model\n"
        "engine = start_random('hf', Path(sys.argv[1]), random_model(), max_length=32, transport='gloo')\n"
        "trainer = HeldModel(random_model(seed=1))\n"
        "manage(trainer, engine).publish(1)\n"
        "os.kill(engine.replicas[0].process.pid, 9)\n"
        "try:\n"
        "    manage(trainer, engine).publish(2)\n"
        "except RuntimeError as error:\n"
        "    print(type(error).__name__, 'killed by SIGKILL' in str(error))\n"
        "began = time.monotonic()\n"
        "engine.stop()\n"
        "assert time.monotonic() - began < 10\n"
        "folders = [os.open('.', os.O_RDONLY) for _ in range(64)]\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env=environment,
    )
    assert (done.returncode, done.stdout) == (0, "EngineLost True\n"), done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"model", "engine.log"}
