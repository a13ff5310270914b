"""What an engine samples and scores, whichever it is: what the trainer would compute."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from atropos_exp.errors import UserError
from atropos_exp.parts.engine.servers import Servers
from atropos_exp.types import Finish, Sample, SamplingParams
from tests.helpers.random_models import (
    VOCAB,
    completion_logprobs,
    greedy_tokens,
    plain_logits,
    plain_logprobs,
    random_prompts,
)


def sampling(**changes: Any) -> SamplingParams:
    values: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_tokens": 6, "seed": 1}
    return SamplingParams(**{**values, "stop_token_ids": (2, 3), **changes})


def ids(groups: list[list[Sample]]) -> list[list[list[int]]]:
    return [[sample.token_ids.tolist() for sample in group] for group in groups]


class SamplingContract:
    """With fixtures `engine` and `model`, which it serves in float32."""

    tolerance: float  # nats, of a logprob
    max_length: int  # of the engine's sequences

    @pytest.mark.parametrize("temperature", [1.0, 0.7])
    def test_samples_carry_what_the_trainer_needs(self, engine: Servers, model: Any, temperature: float) -> None:
        prompts = random_prompts([5, 1, 9])
        params = sampling(temperature=temperature)
        groups = engine.generate(prompts, params, num_samples=8)
        assert [len(group) for group in groups] == [8, 8, 8]
        finishes = set()
        for prompt, group in zip(prompts, groups, strict=True):
            for sample in group:
                assert sample.token_ids.dtype == np.int32 and sample.logprobs.dtype == np.float32
                expected = completion_logprobs(model, prompt, sample.token_ids, temperature)
                np.testing.assert_allclose(sample.logprobs, expected, atol=self.tolerance)
                stopped = sample.token_ids[-1] in params.stop_token_ids
                assert not set(sample.token_ids[:-1].tolist()) & set(params.stop_token_ids)
                assert sample.finish is (Finish.STOP if stopped else Finish.LENGTH)
                assert stopped or len(sample.token_ids) == 6
                assert sample.policy_version == engine.version()
                finishes.add(sample.finish)
        assert finishes == {Finish.STOP, Finish.LENGTH}

    def test_same_request_same_tokens(self, engine: Servers) -> None:
        prompts = random_prompts([5, 7])
        first = engine.generate(prompts, sampling(), num_samples=16)
        again = engine.generate(prompts, sampling(), num_samples=16)
        assert ids(again) == ids(first)
        for one, other in zip(first[0], again[0], strict=True):
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=self.tolerance)
        assert ids(engine.generate(prompts, sampling(seed=2), num_samples=16)) != ids(first)
        assert len({tuple(tokens) for tokens in ids(first)[0]}) > 10  # samples of one prompt differ

    def test_greedy_tokens_are_those_of_transformers(self, engine: Servers, model: Any) -> None:
        greedy = sampling(temperature=0.0, max_tokens=16, stop_token_ids=())
        for prompt in random_prompts([4, 12], seed=5):
            ((sample,),) = engine.generate([prompt], greedy, num_samples=1)
            assert sample.token_ids.tolist() == greedy_tokens(model, prompt, 16)
            # at temperature 0 the logprob is that at temperature 1
            expected = completion_logprobs(model, prompt, sample.token_ids)
            np.testing.assert_allclose(sample.logprobs, expected, atol=self.tolerance)

    @pytest.mark.parametrize("changes", [{"top_p": 0.7}, {"top_k": 5}, {"top_p": 0.9, "top_k": 10}], ids=str)
    def test_logprobs_of_truncated_sampling_are_of_the_whole_distribution(
        self, engine: Servers, model: Any, changes: dict[str, Any]
    ) -> None:
        (prompt,) = random_prompts([6], seed=2)
        params = sampling(temperature=0.8, max_tokens=8, stop_token_ids=(), **changes)
        (group,) = engine.generate([prompt], params, num_samples=12)
        for sample in group:
            expected = completion_logprobs(model, prompt, sample.token_ids, 0.8)
            np.testing.assert_allclose(sample.logprobs, expected, atol=self.tolerance)
        if "top_k" in changes:  # every token is among the likeliest
            for sample in group:
                logits = plain_logits(model, np.concatenate([prompt, sample.token_ids]))[len(prompt) - 1 : -1]
                own = logits.gather(1, torch.tensor(sample.token_ids[:, None].astype(np.int64)))
                assert int((logits > own).sum(dim=1).max()) < changes["top_k"]

    @pytest.mark.parametrize("temperature", [1.0, 0.6, 2.0])
    def test_scores_are_the_trainers(self, engine: Servers, model: Any, temperature: float) -> None:
        sequences = random_prompts([2, 30, 7, 1, self.max_length], seed=4)
        scored = engine.score(sequences, temperature=temperature)
        assert len(scored[3]) == 0
        for sequence, found in zip(sequences, scored, strict=True):
            expected = plain_logprobs(model, sequence, temperature)
            np.testing.assert_allclose(found, expected, atol=self.tolerance)

    def test_the_likeliest_tokens_of_every_place(self, engine: Servers, model: Any) -> None:
        (sequence,) = random_prompts([9], seed=8)
        message = {"token_ids": sequence, "lengths": np.array([len(sequence)]), "temperature": 0.7, "num_top": 3}
        found = engine.replicas[0].exchange("/score", message, what="the likeliest tokens")
        logprobs, top_ids, top_logprobs = found["logprobs"], found["top_token_ids"], found["top_logprobs"]
        np.testing.assert_allclose(logprobs, plain_logprobs(model, sequence, 0.7), atol=self.tolerance)
        top = torch.log_softmax(plain_logits(model, sequence)[:-1] / 0.7, dim=-1).topk(3, dim=-1)
        assert top_ids.tolist() == top.indices.tolist()
        np.testing.assert_allclose(top_logprobs, top.values, atol=self.tolerance)

    def test_wrong_requests_are_refused_with_the_reason(self, engine: Servers) -> None:
        (prompt,) = random_prompts([4])
        length, most = self.max_length - 5, self.max_length - 6
        cases: list[tuple[Any, dict[str, Any], str]] = [
            (random_prompts([length]), {}, f"prompt 0 has {length} tokens; with 6 .* between 1 and {most}"),
            ([np.zeros(0, dtype=np.int32)], {}, "prompt 0 has 0 tokens"),
            ([np.array([0, VOCAB], dtype=np.int32)], {}, f"token id 0..{VOCAB} outside the vocabulary of {VOCAB}"),
            ([prompt], {"top_p": 0.0}, "top_p must be above 0"),
            ([prompt], {"temperature": -1.0}, "temperature must be a number from 0"),
            ([prompt], {"temperature": float("nan")}, "temperature must be a number"),
            ([prompt], {"max_tokens": 0}, "max_tokens must be a number from 1"),
            ([prompt], {"stop_token_ids": (99,)}, "stop token 99 outside the vocabulary"),
        ]
        for prompts, changes, message in cases:
            with pytest.raises(UserError, match=f"refused .*{message}"):
                engine.generate(prompts, sampling(**changes), num_samples=1)
        with pytest.raises(UserError, match="outside the vocabulary"):
            engine.score([np.array([-1, 2], dtype=np.int32)], temperature=1.0)
        assert engine.generate([], sampling(), num_samples=1) == [] and engine.score([], temperature=1.0) == []
        engine.check()
