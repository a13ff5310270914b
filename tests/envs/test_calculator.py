"""The multi-turn environment against the real API, gateway, engine and model: interleaved masks, credit by turn."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atropos_exp.parts.engine.servers import Servers
from atropos_exp.types import SamplingParams

MODULE = "multi_turn_calculator"
GROUP_SIZE, NUM_SUMS = 12, 2
CHAIN = re.compile(
    r"<\|user\|>(\d+)\+(\d+)=<\|assistant\|>(.*?)<\|end\|><\|user\|>(\d+)\+(\d+)=<\|assistant\|>(.*?)(?:<\|end\|>)?"
)


def read_episode(text: str) -> list[bool]:
    """Which of the two sums were answered right; checks that the calculator said what it should."""
    match = CHAIN.fullmatch(text)
    assert match, text
    left, right, first, carried, operand, second = match.groups()
    assert int(carried) == int(left) + int(right)
    return [first == carried, second == str(int(carried) + int(operand))]


def trained_runs(mask: list[int]) -> list[range]:
    """The stretches of a sequence that are trained on."""
    edges = np.flatnonzero(np.diff([False, *(value != -100 for value in mask), False]))
    return [range(start, end) for start, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)]


@pytest.mark.slow
def test_turns_masks_logprobs_and_credit(
    engine: Servers, gateway: str, write_config: Callable[..., Path], programs: Any, helpers: Any
) -> None:
    from transformers import AutoTokenizer

    from data_prep.arithmetic import is_held_out

    tokenizer = AutoTokenizer.from_pretrained(helpers.WEIGHTS)
    api = programs.api()
    api.register(batch_size=4 * GROUP_SIZE, starting_step=0, num_steps=100)
    environment = programs.environment(
        MODULE, "serve", write_config("temperature=1.3"), gateway,  # hot, so that the second sum varies too
        "--env.rollout_server_url", api.url, "--env.token_advantages", "true",
    )  # fmt: skip
    groups = [group for _ in range(8) for group in api.batch(environment)]
    sequences = [np.array(tokens, np.int32) for group in groups for tokens in group["tokens"]]
    scored = iter(engine.score(sequences, temperature=1.3))

    scores, told_apart, cut_inside = [], np.zeros(NUM_SUMS, dtype=int), 0
    for group in groups:
        right = np.array([read_episode(tokenizer.decode(tokens)) for tokens in group["tokens"]], dtype=float)
        assert group["scores"] == right.mean(axis=1).tolist()
        scores += group["scores"]
        deviation = right.std(axis=0)
        told_apart += deviation > 0
        openings = set()
        for at, tokens in enumerate(group["tokens"]):
            mask, logprobs, logprob = group["masks"][at], group["inference_logprobs"][at], next(scored)
            advantages = group["advantages"][at]
            turns = trained_runs(mask)
            assert len(turns) == NUM_SUMS and len(mask) == len(tokens) == len(logprobs) == len(advantages)
            openings.add(tokenizer.decode(tokens[1 : turns[0].start - 1]))
            for index, turn in enumerate(turns):
                assert tokens[turn.start - 1] == 4 and len(turn) <= 3  # <|assistant|> comes before
                np.testing.assert_allclose(
                    [logprobs[position] for position in turn], [logprob[position - 1] for position in turn], atol=2e-4
                )
                credit = (right[at, index] - right[:, index].mean()) / deviation[index] if deviation[index] else 0.0
                np.testing.assert_allclose([advantages[position] for position in turn], credit, atol=1e-9)
            sampled = {position for turn in turns for position in turn}
            assert all(mask[position] == tokens[position] for position in sampled)
            for position in set(range(len(tokens))) - sampled:
                assert (mask[position], logprobs[position], advantages[position]) == (-100, 1.0, 0.0)
            # A turn that the limit cut was ended by the environment: that <|end|> is not the policy's.
            cut_inside += tokens[turns[0].stop - 1] != helpers.STOP
            cut = any(tokens[turn.stop - 1] != helpers.STOP for turn in turns)
            assert (group["overrides"] or [{}] * GROUP_SIZE)[at] == ({"set_advantage_to_zero": True} if cut else {})
        assert len(openings) == 1 and not is_held_out(openings.pop())
    assert 0.1 < np.mean(scores) < 0.9 and told_apart.min() > 0  # both turns have something to learn from
    assert cut_inside > 0


@pytest.mark.slow
def test_evaluation_is_what_the_engine_answers_greedily(
    engine: Servers, gateway: str, write_config: Callable[..., Path], programs: Any, helpers: Any, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(helpers.WEIGHTS)
    program = programs.environment(
        MODULE, "evaluate", write_config(), gateway,
        "--env.data_dir_to_save_evals", str(tmp_path), "--openai.server_type", "sglang",
    )  # fmt: skip
    assert program.wait() == 0, program.text()
    found = json.loads((tmp_path / "metrics.json").read_text())["results"]["all"]
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 48

    greedy = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, max_tokens=3, stop_token_ids=(1,), seed=0)
    right = []
    for sample in samples:
        a, b, c = sample["operands"]
        ids = tokenizer.encode(f"<|user|>{a}+{b}=<|assistant|>", add_special_tokens=False)
        ids += engine.generate([np.array(ids, np.int32)], greedy, num_samples=1)[0][0].token_ids.tolist()
        ids += [] if ids[-1] == 1 else [1]
        ids += tokenizer.encode(f"<|user|>{a + b}+{c}=<|assistant|>", add_special_tokens=False)
        ids += engine.generate([np.array(ids, np.int32)], greedy, num_samples=1)[0][0].token_ids.tolist()
        assert sample["text"] == tokenizer.decode(ids)
        right.append(read_episode(sample["text"]))
    assert [sample["right"] for sample in samples] == right
    assert found["eval/calculator/accuracy"] == np.mean([all(row) for row in right])
    for index in range(NUM_SUMS):
        assert found[f"eval/calculator_sum_{index + 1}/accuracy"] == np.mean([row[index] for row in right])
    assert found["eval/calculator/num"] == 48
