"""What needs no server: who gets which place of a stream, the chains of sums, their credit, and turns as token ids."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atropos_exp.envs.calculator_chain import Chain, Dialogue, draw_chain, evaluate, turn_credit
from atropos_exp.envs.episode import Episode, scored_group
from atropos_exp.envs.run_settings import RunSettings
from atropos_exp.envs.sampler import SampledTurn
from atropos_exp.envs.stream import Stream
from atropos_exp.envs.turn_encoder import TurnEncoder
from atropos_exp.errors import UserError
from atropos_exp.types import Finish

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def places(process: int, of: int, step: int, count: int, env_id: int = 0) -> list[tuple[int, int]]:
    stream = Stream(seed=3, process_index=process, num_processes=of, tasks_per_step=5)
    stream.start(step=step, env_id=env_id)
    return [(place.position, place.seed) for place in (stream.next() for _ in range(count))]


def test_processes_share_the_stream_and_go_on_where_the_trainer_is() -> None:
    taken = [position for process in range(3) for position, _ in places(process, 3, 0, 4)]
    assert sorted(taken) == list(range(12))
    # Step 7 of 5 tasks: position 35, rounded up to a multiple of 3.
    late = [position for process in range(3) for position, _ in places(process, 3, 7, 2)]
    assert sorted(late) == [36, 37, 38, 39, 40, 41]
    # Even if they start at different steps, no two processes share a position.
    mixed = [places(process, 3, step, 50) for process, step in ((0, 0), (1, 7), (2, 2))]
    assert len({position for one in mixed for position, _ in one}) == 150


def test_the_place_of_a_dead_process_is_drawn_with_other_seeds() -> None:
    first = places(0, 1, 4, 20)
    assert first == places(0, 1, 4, 20)
    for other in (places(0, 1, 4, 20, env_id=1), places(0, 1, 3, 25)[5:]):
        assert [position for position, _ in other] == [position for position, _ in first]
        assert not {seed for _, seed in other} & {seed for _, seed in first}


@pytest.mark.parametrize("held_out", [False, True])
def test_chains_stay_within_two_digits_and_on_their_side_of_the_split(held_out: bool) -> None:
    from data_prep.arithmetic import is_held_out

    for num_sums in (1, 2, 4):
        for seed in range(40):
            chain = draw_chain(seed, num_sums, held_out=held_out)
            assert chain == draw_chain(seed, num_sums, held_out=held_out)
            assert len(chain.operands) == num_sums + 1 and all(10 <= one <= 99 for one in chain.operands)
            assert chain.result(num_sums - 1) == sum(chain.operands) <= 99
            questions = [chain.question(index) for index in range(num_sums)]
            assert [is_held_out(question) for question in questions] == [held_out] * num_sums


def test_the_calculator_carries_its_own_result_on() -> None:
    dialogue = Dialogue(Chain(operands=(12, 34, 21, 50)))
    assert dialogue.chain.question(0) == "12+34="
    assert dialogue.reply("10+2 + 30+4 =") == "46"  # an expression: it works it out, the sum is still open
    assert dialogue.reply("45") == "46+21="  # wrong, and goes on from 46
    assert dialogue.reply(" 67. ") == "67+50="
    assert dialogue.reply("one hundred and seventeen") is None
    assert dialogue.answered == [False, True, False] and dialogue.num_right == 1
    assert dialogue.turn_sums == [0, 0, 1, 2]


@pytest.mark.parametrize(("text", "value"), [("1+2", 3), ("10 - 3+ 5", 12), ("7-9", -2)])
def test_the_calculator_calculates(text: str, value: int) -> None:
    assert evaluate(text) == value


def test_credit_is_normalised_over_the_group_for_each_sum() -> None:
    chain = Chain(operands=(11, 11, 11))
    group = [Dialogue(chain) for _ in range(4)]
    for dialogue, answers in zip(group, (("22", "33"), ("22", "0"), ("5+5", "22", "1"), ("9",)), strict=True):
        for answer in answers:
            dialogue.reply(answer)
    # Sum 1: right, right, right, wrong: mean 3/4, deviation sqrt(3)/4. Sum 2: right, wrong, wrong, not reached.
    one, three = 1 / np.sqrt(3), np.sqrt(3)
    expected = [[one, three], [one, -one], [one, one, -one], [-three]]
    for found, row in zip(turn_credit(group), expected, strict=True):
        np.testing.assert_allclose(found, row, rtol=1e-12)
    assert turn_credit(group[:2])[0][0] == 0.0  # both right: nothing to tell them apart by


def completion(ids: list[int], finish: Finish = Finish.STOP) -> SampledTurn:
    return SampledTurn(prompt_ids=[], token_ids=ids, logprobs=[-0.5] * len(ids), finish=finish)


def test_an_episode_trains_on_what_was_sampled_and_nothing_else() -> None:
    episode, other = Episode(), Episode()
    episode.add_context(np.array([7, 8], dtype=np.int32))
    episode.add_completion(completion([0, 1]))
    episode.add_context([9])
    episode.add_completion(completion([5], Finish.LENGTH))
    assert episode.tokens == [7, 8, 0, 1, 9, 5]
    assert episode.masks == [-100, -100, 0, 1, -100, 5]  # token 0 is as good as any
    assert episode.logprobs == [1.0, 1.0, -0.5, -0.5, 1.0, -0.5]
    assert episode.spread([2.0, -3.0]) == [0.0, 0.0, 2.0, 2.0, 0.0, -3.0]
    other.add_completion(completion([5]))
    for mask_truncated, overrides in ((True, [{"set_advantage_to_zero": True}, {}]), (False, None)):
        group = scored_group([episode, other], [1, 0], temperature=0.5, mask_truncated=mask_truncated)
        assert group["overrides"] == overrides and "group_overrides" not in group


def chatml() -> Any:
    """A tokenizer whose end of turn is followed by a line break, which the policy never samples."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE(vocab={token: at for at, token in enumerate(tokens)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"]
    )
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.mark.parametrize("system_prompt", [None, "Reply with a number."])
@pytest.mark.parametrize("which", ["tiny", "chatml"])
def test_turns_put_together_are_the_conversation_that_the_template_writes(
    which: str, system_prompt: str | None, helpers: Any
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(helpers.WEIGHTS) if which == "tiny" else chatml()
    encoder = TurnEncoder(tokenizer, system_prompt=system_prompt, template_arguments={}, role="user")
    end = tokenizer.eos_token_id
    answers = [tokenizer.encode("46", add_special_tokens=False), tokenizer.encode("67", add_special_tokens=False)]
    conversation = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    conversation += [
        {"role": "user", "content": "12+34="}, {"role": "assistant", "content": "46"},
        {"role": "user", "content": "46+21="}, {"role": "assistant", "content": "67"},
        {"role": "user", "content": "67+10="},
    ]  # fmt: skip
    written = tokenizer.apply_chat_template(conversation, tokenize=True, add_generation_prompt=True, return_dict=False)
    for ended in (True, False):  # by the policy itself, or by the token limit: then the end marker is the template's
        ids = encoder.first("12+34=")
        for answer, message in zip(answers, ("46+21=", "67+10="), strict=True):
            ids += [*answer, end] if ended else answer
            ids += encoder.following(message, last_token=ids[-1])
        assert ids == written


def test_a_configuration_of_another_version_is_refused_with_every_reason(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    good = write_config()
    assert RunSettings.read(good).run.group_size == 12 and RunSettings.read(good).mask_truncated
    text = good.read_text().replace("group_size: 12", "group_size: none").replace("mask_truncated", "masked")
    bad = tmp_path / "config.yaml"
    bad.write_text(text)
    with pytest.raises(UserError, match=r"(?s)group_size: got 'none'.*rollout\.mask_truncated: got None"):
        RunSettings.read(bad)
    with pytest.raises(UserError, match=r"nowhere\.yaml cannot be read"):
        RunSettings.read(tmp_path / "nowhere.yaml")
