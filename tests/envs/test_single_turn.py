"""The single-turn environment against the real API, gateway, engine and model."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atropos_exp.envs.run_settings import RunSettings
from atropos_exp.parts.engine.servers import Servers
from atropos_exp.parts.eval.held_out import HeldOutEvaluator
from atropos_exp.parts.reward.pool import RewardPool
from atropos_exp.runs.seeds import derive_seed
from atropos_exp.types import Prompt, Sample, SamplingParams, TokenIds
from tests.helpers.processes import descendants, has_pytorch

MODULE = "single_turn"
START = 2  # the step that the trainer registers with
GROUPS_PER_STEP, GROUP_SIZE = 4, 12


def stream(config: Path, tmp_path: Path, count: int) -> list[Prompt]:
    """The first prompts of the run's own loader."""
    from data_prep.prepare import ensure

    settings = RunSettings.read(config)
    loader = settings.data.loader(
        settings.model.tokenizer(settings.model_folder()),
        seed=settings.run.seed,
        max_prompt_length=settings.run.max_prompt_length,
        max_response_length=settings.run.max_response_length,
        run_folder=tmp_path,
        prepared_folder=ensure(settings.data.prepare),
    )
    return loader.take(count)


def check_group(group: dict[str, Any], tokenizer: Any, scored: Sequence[Any]) -> str:
    """Everything that can be said of a group without its environment; returns the question. `scored`: the engine's
    logprobs of each sequence."""
    assert len(group["tokens"]) == GROUP_SIZE
    assert group["advantages"] is None and group["group_overrides"] is None and group["messages"] is None
    assert group["generation_params"] == {"temperature": 0.9}
    questions = set()
    for at, tokens in enumerate(group["tokens"]):
        mask, logprobs = group["masks"][at], group["inference_logprobs"][at]
        num_prompt = tokens.index(4) + 1  # <|assistant|>
        assert len(tokens) == len(mask) == len(logprobs) and 1 <= len(tokens) - num_prompt <= 3
        assert mask == [-100] * num_prompt + tokens[num_prompt:]
        assert logprobs[:num_prompt] == [1.0] * num_prompt
        np.testing.assert_allclose(logprobs[num_prompt:], scored[at][num_prompt - 1 :], atol=2e-4)
        question = tokenizer.decode(tokens[1 : num_prompt - 1])
        left, right = question.removesuffix("=").split("+")
        answer = tokenizer.decode(tokens[num_prompt:], skip_special_tokens=True)
        assert group["scores"][at] == float(answer.split() == [str(int(left) + int(right))])
        cut = tokens[-1] != 1
        assert (group["overrides"] or [{}] * GROUP_SIZE)[at] == ({"set_advantage_to_zero": True} if cut else {})
        questions.add(question)
    assert len(questions) == 1
    return questions.pop()


def expected_tokens(engine: Servers, prompt: Prompt, seed: int) -> list[list[int]]:
    """What the engine itself draws for a group: calls of at most 8, each with a seed of its own."""
    params = SamplingParams(temperature=0.9, top_p=0.98, top_k=50, max_tokens=3, stop_token_ids=(1,), seed=0)
    drawn: list[Sample] = []
    for call, size in enumerate((8, 4)):
        (samples,) = engine.generate(
            [prompt.token_ids], replace(params, seed=derive_seed(seed, call)), num_samples=size
        )
        drawn += samples
    return [[*prompt.token_ids.tolist(), *sample.token_ids.tolist()] for sample in drawn]


@pytest.mark.slow
def test_groups_reach_the_trainer_exactly_as_they_were_sampled(
    engine: Servers, gateway: str, write_config: Callable[..., Path], programs: Any, tmp_path: Path
) -> None:
    config = write_config()
    api = programs.api()
    api.register(batch_size=GROUPS_PER_STEP * GROUP_SIZE, starting_step=START, num_steps=START + 20)
    flags = ("--env.rollout_server_url", api.url, "--env.num_processes", "2", "--env.process_index")
    environments = []
    for index in range(2):  # one after the other, so that process i is environment i of the API
        environments.append(programs.environment(MODULE, "serve", config, gateway, *flags, str(index)))
        environments[-1].wait_for(lambda index=index: api.has_environment(index), "its registration")
    assert not any(has_pytorch(environment.process.pid) for environment in environments)  # they need none
    time.sleep(7)  # after registering, an environment sleeps for 5 s: the first one must not have used up all steps
    groups: list[dict[str, Any]] = []
    while len(groups) < 12 or {group["env_id"] for group in groups} != {0, 1}:
        groups += api.batch(environments[0])
    assert len(groups) % GROUPS_PER_STEP == 0

    sequences = [np.array(tokens, np.int32) for group in groups for tokens in group["tokens"]]
    scored = iter(engine.score(sequences, temperature=0.9))
    tokenizer = RunSettings.read(config).model.tokenizer(RunSettings.read(config).model_folder())
    questions = [check_group(group, tokenizer, [next(scored) for _ in range(GROUP_SIZE)]) for group in groups]

    # Two processes, one stream, entered where the trainer is: nothing twice, nothing from before.
    prompts = stream(config, tmp_path, 200)
    position_of = {prompt.text: position for position, prompt in enumerate(prompts)}
    positions = [position_of[question] for question in questions]
    assert len(set(positions)) == len(positions) and min(positions) >= START * GROUPS_PER_STEP
    assert all(position % 2 == group["env_id"] for position, group in zip(positions, groups, strict=True))

    for position, group in list(zip(positions, groups, strict=True))[:4]:
        env_id = group["env_id"]
        step = next(
            step for step in range(START, START + 4)  # it registered while the API had that one
            if group["tokens"] == expected_tokens(
                engine, prompts[position], derive_seed(5, "atropos", env_id, step, position)
            )
        )  # fmt: skip
        assert step == START
    assert any(len(set(group["scores"])) == 1 for group in groups)  # equal scores are not held back
    assert any(len(set(group["scores"])) > 1 for group in groups)
    assert any(group["overrides"] for group in groups)
    while any(environment.process.poll() is None for environment in environments):  # until num_steps are past
        api.get("/batch")
    assert [environment.wait() for environment in environments] == [0, 0]


class _OnePromptAtATime:
    """The engine, asked as the environment asks it."""

    def __init__(self, engine: Servers) -> None:
        self._engine = engine

    def generate(self, prompts: Sequence[TokenIds], params: SamplingParams, *, num_samples: int) -> Any:
        return [
            self._engine.generate(
                [prompt], replace(params, seed=derive_seed(derive_seed(params.seed, index), 0)), num_samples=num_samples
            )[0]
            for index, prompt in enumerate(prompts)
        ]


@pytest.mark.slow
def test_evaluation_gives_the_numbers_of_our_own(
    engine: Servers, gateway: str, write_config: Callable[..., Path], programs: Any, tmp_path: Path
) -> None:
    from data_prep.prepare import ensure

    config = write_config()
    program = programs.environment(
        MODULE, "evaluate", config, gateway, "--env.data_dir_to_save_evals", str(tmp_path / "eval")
    )
    assert program.wait() == 0, program.text()
    found = json.loads((tmp_path / "eval" / "metrics.json").read_text())["results"]["all"]

    settings = RunSettings.read(config)
    tokenizer = settings.model.tokenizer(settings.model_folder())
    prompts = settings.data.eval_prompts(
        tokenizer, num_prompts=48, max_prompt_length=32, prepared_folder=ensure(settings.data.prepare)
    )
    with RewardPool(settings.reward, num_workers=1, timeout_seconds=5.0) as scorer:
        ours, alike = (
            HeldOutEvaluator(
                settings=settings.eval,
                prompts=prompts, engine=used, scorer=scorer, tokenizer=tokenizer, stop_token_ids=(1,),
                max_tokens=3, seed=settings.run.seed,
            )(0)
            for used in (engine, _OnePromptAtATime(engine))
        )  # fmt: skip
    assert found == alike  # seed for seed: pass@k too
    greedy = [name for name in ours if "pass_at" not in name]
    assert len(greedy) == 6 and {name: found[name] for name in greedy} == {name: ours[name] for name in greedy}
    assert 0.1 < found["eval/arithmetic/accuracy"] < 0.9 and "eval/arithmetic/pass_at_3" in found

    samples = [json.loads(line) for line in (tmp_path / "eval" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 48 * (1 + 3)
    assert all(sample["score"] == float(sample["answer"] == sample["ground_truth"]) for sample in samples)
    assert found["eval/arithmetic/accuracy"] == np.mean([sample["score"] for sample in samples[:48]])


def test_process_writes_groups_without_an_api(
    gateway: str, write_config: Callable[..., Path], programs: Any, tmp_path: Path
) -> None:
    path = tmp_path / "groups.jsonl"
    program = programs.environment(
        MODULE, "process", write_config(), gateway, "--env.data_path_to_save_groups", str(path),
        "--env.total_steps", "2", "--env.group_size", "3", "--env.temperature", "0.5",
    )  # fmt: skip
    assert program.wait() == 0, program.text()
    groups = [json.loads(line) for line in path.read_text().splitlines()]
    assert [len(group["tokens"]) for group in groups] == [3, 3]
    prompts = stream(write_config(), tmp_path, 2)
    for group, prompt in zip(groups, prompts, strict=True):
        assert group["generation_params"] == {"temperature": 0.5}
        for messages, score in zip(group["messages"], group["scores"], strict=True):
            assert [message["role"] for message in messages] == ["user", "assistant"]
            assert messages[0]["content"] == prompt.text
            assert score == float(messages[1]["content"] == prompt.ground_truth)


def test_answers_that_cannot_be_scored_are_named_and_nothing_outlives_the_environment(
    gateway: str, write_config: Callable[..., Path], programs: Any
) -> None:
    api = programs.api()
    api.register(batch_size=GROUPS_PER_STEP * GROUP_SIZE, starting_step=0, num_steps=100)
    environment = programs.environment(
        MODULE, "serve", write_config("reward.timeout_seconds=1e-9"), gateway, "--env.rollout_server_url", api.url
    )
    # One by one an answer may be scored before anybody looks at the clock.
    environment.wait_for(lambda: api.get("/latest_example").get("overrides"), "a group with a late answer")
    group = api.get("/latest_example")
    assert len(group["scores"]) == GROUP_SIZE, "whole, so that it cannot wait in the API for ever"
    if group["overrides"]:  # another one may have come since
        assert {override.get("dropped", "timeout") for override in group["overrides"]} == {"timeout"}

    children = environment.wait_for(lambda: descendants(environment.process.pid), "its reward process")
    environment.kill()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline, f"processes that outlived the environment: {children}"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "env.run_config: it is missing"),
        (("--env.process_index", "2", "--env.num_processes", "2"), "env.process_index: got 2 of num_processes=2"),
    ],
)
def test_mistakes_end_it_with_code_2_and_say_what(
    flags: tuple[str, ...], said: str, write_config: Callable[..., Path], programs: Any
) -> None:
    given = ("--env.run_config", str(write_config()), *flags) if flags else ()
    program = programs.start("-m", "atropos_exp.envs.single_turn", "serve", *given)
    assert program.wait() == 2, program.text()
    assert said in program.text() and "Traceback" not in program.text()
