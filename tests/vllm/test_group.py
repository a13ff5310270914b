"""Weights to real vLLM through a process group (Gloo on a CPU), one server and two."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atropos_exp.assembly.resync import Resync
from atropos_exp.errors import EngineError, SyncError
from atropos_exp.processes.ranks import Ranks
from atropos_exp.types import SamplingParams
from atropos_exp.weights.digest import digest
from tests.helpers.faulty_lines import SQUARE, TransposesOne
from tests.helpers.publishing import HeldModel, manage
from tests.helpers.random_models import random_model, random_prompts

pytestmark = pytest.mark.vllm

PARAMS = SamplingParams(temperature=0.8, top_p=1.0, top_k=0, max_tokens=5, stop_token_ids=(), seed=3)
ALONE = Ranks(rank=0, world_size=1)


@pytest.mark.timeout(600)
def test_two_servers_in_one_group(tmp_path: Path, start: Any, engine: Any) -> None:
    """Proven for both; the same tokens as one server gives; a fault is caught; one that is killed comes back."""
    trainer = HeldModel(random_model(seed=1))
    pair = start(tmp_path, random_model(seed=0), transport="gloo", data_parallel_size=2, kv_cache_gb=0.25)
    try:
        for bucket_bytes in (1, 1 << 30):
            trainer.disturb()
            version = pair.version() + 1
            stats = manage(trainer, pair, bucket_bytes=bucket_bytes).publish(version)
            expected = {name: digest(tensor) for name, tensor in trainer.model.named_parameters()}
            assert [one.digests() for one in pair.replicas] == [expected, expected]
            assert stats.digests_compared == len(expected) and stats.canary_gap_max < 1e-4

        manage(trainer, engine).publish(engine.version() + 1)
        prompts = random_prompts([5, 130, 9], seed=2)
        ours, theirs = (one.generate(prompts, PARAMS, num_samples=2) for one in (pair, engine))
        for mine, other in zip(sum(ours, start=[]), sum(theirs, start=[]), strict=True):  # noqa: RUF017
            assert mine.token_ids.tolist() == other.token_ids.tolist()
            np.testing.assert_allclose(mine.logprobs, other.logprobs, atol=1e-4)

        with pytest.raises(SyncError, match=f"other bits than were sent of {SQUARE} "):
            manage(trainer, TransposesOne(pair)).publish(version + 1)
        with pytest.raises(EngineError, match="weights incomplete"):
            pair.check()
        with pytest.raises(EngineError, match="sent twice"), pair.updating(version + 1) as receiver:
            receiver.receive([next(trainer.parameters())])
            receiver.receive([next(trainer.parameters())])  # refused before it is read

        resync = Resync(manage(trainer, pair), pair, ALONE, max_restarts=1)
        os.kill(pair.replicas[1].process.pid, signal.SIGKILL)
        assert resync.publish(version + 1).policy_version == version + 1
        assert (resync.num_restarts, resync.num_verified) == (1, 1)
        pair.check()
    finally:
        pair.stop()
