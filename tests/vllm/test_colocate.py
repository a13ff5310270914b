"""An engine that gives its memory back while the trainer updates, and is woken by the weight sync that follows."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from atropos_exp.assembly.colocated import taking_turns
from atropos_exp.assembly.resync import Resync
from atropos_exp.errors import EngineError
from atropos_exp.parts.engine.servers import Servers
from atropos_exp.parts.engine.vllm import settings as vllm
from atropos_exp.processes.ranks import Ranks
from atropos_exp.types import SamplingParams
from tests.helpers.engines import engine_settings
from tests.helpers.faulty_lines import BreaksHalfWay
from tests.helpers.publishing import HeldModel, manage
from tests.helpers.random_models import completion_logprobs, random_model, random_prompts

GREEDY = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, max_tokens=8, stop_token_ids=(), seed=0)
CACHE_BYTES = 2**27


@pytest.fixture(scope="module")
def sleepy(tmp_path_factory: pytest.TempPathFactory, start: Any) -> Iterator[Servers]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm, "SERVER", "tests.vllm.sleepy_server")
        folder = tmp_path_factory.mktemp("sleepy")
        patch.setenv("VLLM_FAULTS", str(folder))
        model = random_model(seed=0)
        client = start(folder, model, colocate=True, kv_cache_gb=CACHE_BYTES / 2**30)
        yield client
    client.stop()


def assert_serves(engine: Servers, trainer: Any) -> None:
    prompts = random_prompts([40, 280], seed=3)
    for prompt, (sample,) in zip(prompts, engine.generate(prompts, GREEDY, num_samples=1), strict=True):
        expected = completion_logprobs(trainer.model, prompt, sample.token_ids, 1.0)
        np.testing.assert_allclose(sample.logprobs, expected, atol=1e-4)


@pytest.mark.vllm
def test_an_update_wakes_it_with_new_weights_and_an_empty_cache(sleepy: Servers) -> None:
    trainer = HeldModel(random_model(seed=1))
    sleepy.sleep()
    manage(trainer, sleepy).publish(sleepy.version() + 1)  # now every page of it is in use
    assert_serves(sleepy, trainer)  # leaves a long prompt in the prefix cache
    num_cached = sleepy.replicas[0].info()["num_cached_tokens"]
    before, after = sleepy.sleep()
    assert before - after > CACHE_BYTES * 0.9
    assert sleepy.sleep()[0] == pytest.approx(after, rel=0.02), "again changes nothing"
    info = sleepy.replicas[0].info()
    assert info["is_asleep"] is True and "asleep since version" in info["problem"]

    trainer.disturb()
    stats = manage(trainer, sleepy, bucket_bytes=40_000).publish(sleepy.version() + 1)
    assert stats.canary_gap_max < 1e-4 and stats.digests_compared == stats.num_tensors
    info = sleepy.replicas[0].info()
    assert (info["is_asleep"], info["problem"]) == (False, None) and info["update_seconds"]["wake"] > 0
    assert_serves(sleepy, trainer)
    assert sleepy.replicas[0].info()["num_cached_tokens"] == num_cached, "nothing was found in the cache after it slept"


@pytest.mark.vllm
def test_an_update_that_breaks_leaves_it_refusing_until_a_whole_one(sleepy: Servers) -> None:
    trainer = HeldModel(random_model(seed=2))
    version = sleepy.version() + 1
    sleepy.sleep()
    with pytest.raises(ConnectionError, match="the line is cut"):
        manage(trainer, BreaksHalfWay(sleepy), bucket_bytes=1).publish(version)
    with pytest.raises(EngineError, match=f"answered 409: weights incomplete: update to version {version} interr"):
        sleepy.check()
    sleepy.sleep()  # half awake: the rest goes on sleeping, the next update wakes it
    assert sleepy.replicas[0].info()["is_asleep"] is True
    manage(trainer, sleepy).publish(version)
    assert_serves(sleepy, trainer)


@pytest.mark.vllm
def test_it_sleeps_during_the_trainer_s_update_also_after_a_restart(sleepy: Servers) -> None:
    class Training(HeldModel):
        def update(self, batch: Any) -> Any:
            seen.append(sleepy.replicas[0].info()["is_asleep"])
            self.disturb()
            return batch

    seen: list[bool] = []
    inner = Training(random_model(seed=4))
    ranks = Ranks(rank=0, world_size=1)
    resync = Resync(manage(inner, sleepy), sleepy, ranks, max_restarts=1)
    update = taking_turns(inner.update, resync)
    resync.publish(sleepy.version() + 1)
    assert resync.counters() == {"engine/restarts": 0}
    for step in range(2):
        assert update(step) == step  # type: ignore[arg-type, comparison-overlap]
        resync.publish(sleepy.version() + 1)
        assert_serves(sleepy, inner)
    counters = resync.counters()
    assert counters["engine/memory_freed_gb"] > CACHE_BYTES * 0.9 / 2**30
    left = counters["engine/memory_awake_gb"] - counters["engine/memory_freed_gb"]
    assert counters["engine/memory_asleep_gb"] == pytest.approx(left) and left > 0

    os.kill(sleepy.replicas[0].process.pid, signal.SIGKILL)
    update(2)  # type: ignore[arg-type]
    resync.publish(sleepy.version() + 1)
    assert_serves(sleepy, inner)
    assert seen == [True] * 3 and resync.num_restarts == 1


@pytest.mark.vllm
def test_a_server_without_it_says_so_and_goes_on(engine: Servers) -> None:
    with pytest.raises(EngineError, match=r"answered 400: this engine was started without engine\.colocate=true"):
        engine.sleep()
    assert engine.generate(random_prompts([5]), GREEDY, num_samples=1)


def test_it_is_refused_where_nothing_is_shared() -> None:
    def problems(device: str, **changes: Any) -> list[str]:
        found = engine_settings("vllm", colocate=True, **changes).preflight(device=device)
        return [problem for problem in found if "engine.colocate=true" in problem]

    (problem,) = problems("cpu")
    assert "got a CPU, where vLLM has no sleep mode. Leave engine.colocate=false" in problem
    (problem,) = problems("cuda", gpus=[1])
    assert "got engine.gpus=[1]" in problem
    assert problems("cuda") == []
    assert engine_settings("vllm", colocate=True).engine_arguments("cuda")["enable_sleep_mode"] is True
    assert "enable_sleep_mode" not in engine_settings("vllm").engine_arguments("cuda")
