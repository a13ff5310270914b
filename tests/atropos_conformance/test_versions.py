"""Groups that were really sampled, by known weights and at known temperatures, and come back late, twice or altered."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest

from atropos_exp.processes.ports import HeldPort
from tests.atropos_conformance import expected, trainer
from tests.atropos_conformance.expected import IGNORED, SENTINEL, Group
from tests.atropos_conformance.groups import REASONS
from tests.atropos_conformance.programs import START_SECONDS, wait_for

MAX_LAG = 2
EQUAL = 5e-4
CLOSE = 2e-4  # nats, between a sampler and a plain forward pass
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


class Sampler:
    """Asks the trainer's inference server as atroposlib's vLLM client does."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def answer(self, client: httpx.Client, prompt: list[int], *, n: int, temperature: float) -> httpx.Response:
        body = {
            "prompt": {"prompt_token_ids": prompt},
            "logprobs": 0,
            "n": n,
            "max_tokens": 6,
            "temperature": temperature,
            "top_p": 1.0,
        }
        return client.post(f"{self.url}/generate", json=body)

    def group(self, prompt: list[int], *, temperature: float = 1.0) -> Group:
        """Four completions that are not all the same: those would have no gradient. The less likely, the better its
        score, which keeps the sampler from always saying the same."""
        with httpx.Client(timeout=120.0, trust_env=False) as client:
            for _ in range(50):
                response = self.answer(client, prompt, n=4, temperature=temperature)
                assert response.status_code == 200, response.text
                said = [
                    [next((int(token), logprob) for token, logprob in entry[0].items()) for entry in completion]
                    for completion in response.json()["logprobs"]
                ]
                if len({tuple(token for token, _ in one) for one in said}) > 1:
                    break
            else:
                raise AssertionError(f"50 times four completions that are all the same: {said}")
        likeliest_first = sorted(range(4), key=lambda at: -sum(logprob for _, logprob in said[at]))
        return {
            "tokens": [prompt + [token for token, _ in one] for one in said],
            "masks": [[IGNORED] * len(prompt) + [token for token, _ in one] for one in said],
            "inference_logprobs": [[SENTINEL] * len(prompt) + [logprob for _, logprob in one] for one in said],
            "scores": [[0.0, 0.25, 0.5, 1.0][likeliest_first.index(at)] for at in range(4)],
        }


class Busy:
    """Asks without a pause in a thread of its own, weight updates included."""

    def __init__(self, sampler: Sampler, prompt: list[int]) -> None:
        self.answers: list[tuple[int, list[str]]] = []
        self._sampler, self._prompt = sampler, prompt
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()

    def _ask(self) -> None:
        with httpx.Client(timeout=120.0, trust_env=False) as client:
            while not self._done.is_set():
                response = self._sampler.answer(client, self._prompt, n=1, temperature=1.0)
                self.answers.append((response.status_code, response.json().get("finish_reasons", [])))

    def stop(self) -> None:
        self._done.set()
        self._thread.join(130)
        assert not self._thread.is_alive(), "an answer never came"


@pytest.fixture(scope="module")
def story(started: Any) -> Iterator[SimpleNamespace]:
    told = SimpleNamespace(groups={})
    api, port = started.api(), HeldPort()
    run = started.run(
        "run",
        steps=6,
        api_url=api.url,
        gateway_port=port.number,
        max_version_lag=MAX_LAG,
        keeps_weights=True,
        learning_rate=1e-3,
    )
    run.wait_until(lambda: api.is_registered, "the trainer registers", START_SECONDS)
    environment, sampler = started.environment(api.url), Sampler(port.number)
    prompts = iter([3, 16 + a, 16 + b, 15, 16 + b, 16 + a, 4] for a in range(9) for b in range(a))

    def sample(name: str, **options: Any) -> Group:
        told.groups[name] = sampler.group(next(prompts), **options)
        return dict(told.groups[name])

    late = sample("late")
    environment.send(sample("first a"), sample("first b"))
    run.wait_for_steps(1)
    busy = Busy(sampler, next(prompts))
    started.later(busy.stop)
    old = sample("old a"), sample("old b")
    environment.send(sample("second a"), sample("second b"))
    run.wait_for_steps(2)
    environment.send(*old, sample("new a"), sample("new b"))  # two batches at once; the API hands out the newer first
    run.wait_for_steps(4)
    warm = sample("warm", temperature=1.7)
    del warm["inference_logprobs"]
    environment.send(late, warm)
    run.wait_for_steps(5)
    busy.stop()
    told.answers = busy.answers
    altered = sample("altered")
    altered["inference_logprobs"] = [
        [value if value == SENTINEL else -5.0 for value in row] for row in altered["inference_logprobs"]
    ]
    environment.send(dict(told.groups["new a"]), altered)
    assert run.wait(120) == 0, run.output
    wait_for(lambda: trainer.status(run.folder) == "finished", "its summary", 10)
    told.run, told.steps = run, run.steps()
    yield told


def check(story: SimpleNamespace, step: int, *names: str, temperature: float = 1.0) -> None:
    """The step trained just these groups, with weights of the update by what the sampler said."""
    groups = [{**story.groups[name], "generation_params": {"temperature": temperature}} for name in names]
    found = story.steps[step - 1]
    assert sorted(one.tokens for group in found.groups for one in group) == sorted(
        row for group in groups for row in group["tokens"]
    )
    right = expected.update(groups, weights=trainer.weights(story.run.folder, step))
    assert right["grad_norm"] > 0.01, "there is something to compare"
    assert found.losses["policy"] == pytest.approx(right["policy"], rel=EQUAL, abs=2e-5)
    assert found.losses["grad_norm"] == pytest.approx(right["grad_norm"], rel=EQUAL)


def versions(story: SimpleNamespace, step: int) -> set[int]:
    return {one.policy_version for group in story.steps[step - 1].groups for one in group}


def test_groups_of_the_newest_weights(story: SimpleNamespace) -> None:
    """group of the newest weights: version recorded; on-policy numbers."""
    check(story, 1, "first a", "first b")
    check(story, 2, "second a", "second b")
    assert (versions(story, 1), versions(story, 2)) == ({0}, {1})


def test_batches_formed_at_once_are_trained_oldest_first(story: SimpleNamespace) -> None:
    """several batches formed at once: oldest weights first."""
    check(story, 3, "old a", "old b")
    check(story, 4, "new a", "new b")
    assert (versions(story, 3), versions(story, 4)) == ({1}, {2})


def test_older_groups_get_the_importance_weights_of_an_independent_computation(story: SimpleNamespace) -> None:
    """older groups: importance weights as computed independently."""
    for step, names in ((3, ("old a", "old b")), (4, ("new a", "new b"))):
        groups = [story.groups[name] for name in names]
        without = expected.update(groups, weights=trainer.weights(story.run.folder, step), cap=None)
        check(story, step, *names)
        assert without["grad_norm"] != pytest.approx(story.steps[step - 1].losses["grad_norm"], rel=0.005)


def test_stated_version_is_the_one_that_sampled(story: SimpleNamespace) -> None:
    """version of each rollout: the one that sampled it."""
    # The logprobs that came with each token are those of exactly these weights.
    for step in story.steps:
        for one in (one for group in step.groups for one in group):
            trained = np.array(one.trained)
            gaps = {
                version: float(np.abs(_logprobs(story, version, one)[trained] - np.array(one.logprobs)[trained]).max())
                for version in {one.policy_version, max(0, one.policy_version - 1), one.policy_version + 1}
            }
            assert gaps[one.policy_version] < CLOSE, (step.step, gaps)
            assert gaps[one.policy_version] == min(gaps.values())


def _logprobs(story: SimpleNamespace, version: int, one: Any) -> np.ndarray:
    weights = trainer.weights(story.run.folder, version + 1)
    return np.array(expected.logprobs(weights, one.tokens, temperature=one.temperature or 1.0))


def test_too_old_a_group_is_dropped(story: SimpleNamespace) -> None:
    """older than allowed: dropped and counted."""
    assert trainer.dropped(story.run.folder)[REASONS["too old"]] == 1


def test_missing_logprobs_and_temperature_come_from_the_sampler(story: SimpleNamespace) -> None:
    """logprobs and temperature not sent: the sampler's."""
    check(story, 5, "warm", temperature=1.7)
    (group,) = story.steps[4].groups
    assert {one.temperature for one in group} == {1.7}
    for one in group:
        at = story.groups["warm"]["tokens"].index(one.tokens)
        right = [0.0 if value == SENTINEL else value for value in story.groups["warm"]["inference_logprobs"][at]]
        assert one.logprobs == pytest.approx(right, abs=1e-5)


def test_other_logprobs_than_the_sampler_gave_are_corrected(story: SimpleNamespace) -> None:
    """wrong logprobs: the sampler's."""
    check(story, 6, "altered")


def test_group_that_comes_back_twice_is_trained_once(story: SimpleNamespace) -> None:
    """the same group again: dropped and counted."""
    assert trainer.dropped(story.run.folder) == {REASONS["too old"]: 1, REASONS["doubled"]: 1}


def test_requests_wait_for_new_weights_and_none_is_aborted(story: SimpleNamespace) -> None:
    """requests during weight updates: all answered 200, stop or length."""
    assert len(story.answers) > 10
    assert {status for status, _ in story.answers} == {200}
    assert {reason for _, reasons in story.answers for reason in reasons} <= {"stop", "length"}
