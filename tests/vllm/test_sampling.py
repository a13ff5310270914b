"""What vLLM samples and scores is what the trainer would compute."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from atropos_exp.engine.client import EngineClient
from atropos_exp.types import Finish, Sample, SamplingParams, UserError

pytestmark = pytest.mark.vllm


def sampling(**changes: Any) -> SamplingParams:
    values: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_tokens": 6, "seed": 1}
    return SamplingParams(**{**values, "stop_token_ids": (2, 3), **changes})


def ids(groups: list[list[Sample]]) -> list[list[list[int]]]:
    return [[sample.token_ids.tolist() for sample in group] for group in groups]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_samples_carry_what_the_trainer_needs(
    engine: EngineClient, model: Any, helpers: Any, temperature: float
) -> None:
    prompts = helpers.prompts([5, 1, 9])
    params = sampling(temperature=temperature)
    groups = engine.generate(prompts, params, num_samples=8)
    assert [len(group) for group in groups] == [8, 8, 8]
    finishes = set()
    for prompt, group in zip(prompts, groups, strict=True):
        for sample in group:
            assert sample.token_ids.dtype == np.int32 and sample.logprobs.dtype == np.float32
            expected = helpers.logprobs(model, prompt, sample.token_ids, temperature)
            np.testing.assert_allclose(sample.logprobs, expected, atol=1e-4)
            stopped = sample.token_ids[-1] in params.stop_token_ids
            assert not set(sample.token_ids[:-1].tolist()) & set(params.stop_token_ids)
            assert sample.finish is (Finish.STOP if stopped else Finish.LENGTH)
            assert stopped or len(sample.token_ids) == 6
            assert sample.policy_version == engine.version() == 0
            finishes.add(sample.finish)
    assert finishes == {Finish.STOP, Finish.LENGTH}


def test_same_request_same_tokens(engine: EngineClient, helpers: Any) -> None:
    prompts = helpers.prompts([5, 7])
    first = engine.generate(prompts, sampling(), num_samples=16)
    assert ids(engine.generate(prompts, sampling(), num_samples=16)) == ids(first)
    assert ids(engine.generate(prompts, sampling(seed=2), num_samples=16)) != ids(first)
    assert len({tuple(tokens) for tokens in ids(first)[0]}) > 10  # samples of one prompt differ


def test_greedy_tokens_are_those_of_transformers(engine: EngineClient, model: Any, helpers: Any) -> None:
    for prompt in helpers.prompts([4, 12], seed=5):
        ((sample,),) = engine.generate(
            [prompt], sampling(temperature=0.0, max_tokens=16, stop_token_ids=()), num_samples=1
        )
        input_ids = torch.tensor(prompt[None, :].astype(np.int64))
        plain = model.generate(
            input_ids, attention_mask=torch.ones_like(input_ids), do_sample=False, max_new_tokens=16, pad_token_id=0
        )
        assert sample.token_ids.tolist() == plain[0, len(prompt) :].tolist()
        # at temperature 0 the logprob is that at temperature 1
        np.testing.assert_allclose(sample.logprobs, helpers.logprobs(model, prompt, sample.token_ids, 1.0), atol=1e-4)


@pytest.mark.parametrize("changes", [{"top_p": 0.7}, {"top_k": 5}, {"top_p": 0.9, "top_k": 10}], ids=str)
def test_logprobs_of_truncated_sampling_are_of_the_whole_distribution(
    engine: EngineClient, model: Any, helpers: Any, changes: dict[str, Any]
) -> None:
    (prompt,) = helpers.prompts([6], seed=2)
    params = sampling(temperature=0.8, max_tokens=8, stop_token_ids=(), **changes)
    (group,) = engine.generate([prompt], params, num_samples=12)
    for sample in group:
        expected = helpers.logprobs(model, prompt, sample.token_ids, 0.8)
        np.testing.assert_allclose(sample.logprobs, expected, atol=1e-4)
    if "top_k" in changes:  # every token is among the likeliest
        whole = torch.tensor(np.concatenate([prompt, group[0].token_ids])[None, :].astype(np.int64))
        with torch.inference_mode():
            logits = model(input_ids=whole).logits[0, len(prompt) - 1 : -1]
        ranks = (logits > logits.gather(1, whole[0, len(prompt) :, None])).sum(dim=1)
        assert int(ranks.max()) < changes["top_k"]


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.0])
def test_scores_are_the_trainers(engine: EngineClient, model: Any, helpers: Any, temperature: float) -> None:
    sequences = helpers.prompts([2, 30, 7, 1, helpers.max_length], seed=4)
    scored = engine.score(sequences, temperature=temperature)
    expected = helpers.HeldModel(model).logprobs(sequences[:3] + sequences[4:], temperature=temperature)
    assert len(scored[3]) == 0
    for one, other in zip(scored[:3] + scored[4:], expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_a_short_request_joins_and_leaves_a_running_batch(engine: EngineClient, helpers: Any) -> None:
    (prompt,) = helpers.prompts([8])
    ended: dict[str, float] = {}

    def ask(name: str, max_tokens: int, num_samples: int) -> None:
        params = sampling(max_tokens=max_tokens, stop_token_ids=())
        (group,) = engine.generate([prompt], params, num_samples=num_samples)
        assert {len(sample.token_ids) for sample in group} == {max_tokens}
        ended[name] = time.monotonic()

    long = threading.Thread(target=ask, args=("long", 290, 16))
    long.start()
    deadline = time.monotonic() + 60
    while engine.info()["num_running_rows"] < 16:
        assert time.monotonic() < deadline, "waited 60 s for the long request to run"
        time.sleep(0.01)
    ask("short", 4, 2)
    engine.check()  # so does a sign of health
    ended["check"] = time.monotonic()
    assert "long" not in ended, "it must still run"
    long.join(timeout=120)
    assert ended["short"] < ended["check"] < ended["long"]


def test_prompts_of_a_group_share_their_prefix(engine: EngineClient, helpers: Any) -> None:
    (prompt,) = helpers.prompts([260], seed=11)
    before = engine.info()
    engine.generate([prompt], sampling(), num_samples=4)
    engine.generate([prompt], sampling(seed=3), num_samples=4)
    after = engine.info()
    assert after["num_prompt_tokens"] - before["num_prompt_tokens"] == 8 * 260
    assert after["num_cached_tokens"] - before["num_cached_tokens"] >= 4 * 256


def test_requests_of_several_threads(engine: EngineClient, helpers: Any) -> None:
    prompts = helpers.prompts([4] * 8, seed=3)

    def ask(index: int) -> Any:
        return ids(engine.generate([prompts[index]], sampling(seed=index), num_samples=2))

    alone = [ask(index) for index in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == alone


def test_wrong_requests_are_refused_with_the_reason(engine: EngineClient, helpers: Any) -> None:
    (prompt,) = helpers.prompts([4])
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (helpers.prompts([helpers.max_length - 5]), {}, "prompt 0 has 295 tokens; with 6 .* between 1 and 294"),
        ([np.array([0, helpers.vocab], dtype=np.int32)], {}, "token id 0..48 outside the vocabulary of 48"),
        ([prompt], {"top_p": 0.0}, "top_p must be above 0"),
        ([prompt], {"stop_token_ids": (99,)}, "stop token 99 outside the vocabulary"),
    ]
    for prompts, changes, message in cases:
        with pytest.raises(UserError, match=f"engine vllm refused .*{message}"):
            engine.generate(prompts, sampling(**changes), num_samples=1)
    engine.check()


def test_the_server_says_which_versions_it_runs(engine: EngineClient) -> None:
    versions = engine.info()["versions"]
    assert versions["vllm"].startswith("0.") and versions["torch"].startswith("2.")


def test_the_likeliest_tokens_of_every_place(engine: EngineClient, model: Any, helpers: Any) -> None:
    (sequence,) = helpers.prompts([9], seed=8)
    logprobs, top_ids, top_logprobs = engine.score_top(sequence, temperature=0.7, num_top=3)
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor(sequence[None, :].astype(np.int64))).logits[0, :-1] / 0.7
    expected = torch.log_softmax(logits, dim=-1)
    own = expected.gather(1, torch.tensor(sequence[1:, None].astype(np.int64)))[:, 0]
    np.testing.assert_allclose(logprobs, own, atol=1e-4)
    top = expected.topk(3, dim=-1)
    assert top_ids.tolist() == top.indices.tolist()
    np.testing.assert_allclose(top_logprobs, top.values, atol=1e-4)
