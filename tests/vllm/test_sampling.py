"""What vLLM samples and scores is what the trainer would compute."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atropos_exp.parts.engine.servers import Servers
from atropos_exp.parts.model.tiny import WEIGHTS
from tests.helpers.engines import start_engine
from tests.helpers.publishing import HeldModel, manage
from tests.helpers.random_models import plain_logits, random_model, random_prompts
from tests.helpers.sampling_contract import SamplingContract, ids, sampling

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module", autouse=True)
def served(engine: Servers, model: Any) -> None:
    manage(HeldModel(model), engine).publish(engine.version() + 1)


class TestSampling(SamplingContract):
    tolerance = 1e-4
    max_length = 300  # as conftest.py says


def test_a_short_request_joins_and_leaves_a_running_batch(engine: Servers) -> None:
    (prompt,) = random_prompts([8])
    ended: dict[str, float] = {}

    def ask(name: str, max_tokens: int, num_samples: int) -> None:
        params = sampling(max_tokens=max_tokens, stop_token_ids=())
        (group,) = engine.generate([prompt], params, num_samples=num_samples)
        assert {len(sample.token_ids) for sample in group} == {max_tokens}
        ended[name] = time.monotonic()

    long = threading.Thread(target=ask, args=("long", 290, 16))
    long.start()
    deadline = time.monotonic() + 60
    while engine.replicas[0].info()["num_running_rows"] < 16:
        assert time.monotonic() < deadline, "waited 60 s for the long request to run"
        time.sleep(0.01)
    ask("short", 4, 2)
    engine.check()  # so does a sign of health
    ended["check"] = time.monotonic()
    assert "long" not in ended, "it must still run"
    long.join(timeout=120)
    assert ended["short"] < ended["check"] < ended["long"]


def test_prompts_of_a_group_share_their_prefix(engine: Servers) -> None:
    (prompt,) = random_prompts([260], seed=11)
    before = engine.replicas[0].info()
    engine.generate([prompt], sampling(), num_samples=4)
    engine.generate([prompt], sampling(seed=3), num_samples=4)
    after = engine.replicas[0].info()
    assert after["num_prompt_tokens"] - before["num_prompt_tokens"] == 8 * 260
    assert after["num_cached_tokens"] - before["num_cached_tokens"] >= 4 * 256


def test_more_prompt_tokens_than_a_step_takes(engine: Servers) -> None:
    """A prompt read in parts must not cost the seeds, nor the server (vLLM 0.30 on a CPU)."""
    prompts = random_prompts([int(length) for length in np.linspace(100, 140, 48)], seed=12)
    params = sampling(max_tokens=3)
    together = engine.generate(prompts, params, num_samples=2)
    alone = engine.replicas[0].generate(prompts[-1:], params, num_samples=2, first_prompt=47)
    assert ids(together[-1:]) == ids(alone)


def test_requests_of_several_threads(engine: Servers) -> None:
    prompts = random_prompts([4] * 8, seed=3)

    def ask(index: int) -> Any:
        return ids(engine.generate([prompts[index]], sampling(seed=index), num_samples=2))

    alone = [ask(index) for index in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == alone


def test_the_server_says_which_versions_it_runs(engine: Servers) -> None:
    versions = engine.replicas[0].info()["versions"]
    assert versions["vllm"].startswith("0.") and versions["torch"].startswith("2.")


@pytest.mark.parametrize("which", ["untied", "tiny"])
def test_greedy_tokens_are_those_of_engine_hf(which: str, tmp_path: Path) -> None:
    """As far as no two tokens are as good as equally likely: then either is right, and what follows differs."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "model"
    if which == "untied":
        random_model(tied=False, seed=9).save_pretrained(folder)
    else:
        folder = WEIGHTS
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", attn_implementation="sdpa")
    prompts = random_prompts([3, 9, 17, 30, 8, 8, 8, 8], seed=12)
    greedy = sampling(temperature=0.0, max_tokens=24, stop_token_ids=())
    found = {}
    for option in ("hf", "vllm"):
        engine = start_engine(option, tmp_path, folder, max_length=64, dtype="float32")
        try:
            found[option] = ids(engine.generate(prompts, greedy, num_samples=1))
        finally:
            engine.stop()
    num_compared = 0
    for prompt, (one,), (other,) in zip(prompts, found["hf"], found["vllm"], strict=True):
        whole = np.concatenate([prompt, np.array(one, dtype=np.int32)])
        best, second = plain_logits(model, whole)[len(prompt) - 1 : -1].topk(2, dim=-1).values.T
        close = (best - second < 1e-3).nonzero()
        end = int(close[0]) if len(close) else len(one)
        assert other[:end] == one[:end]
        num_compared += end
    assert num_compared > 0.8 * len(prompts) * greedy.max_tokens
