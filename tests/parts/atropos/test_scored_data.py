"""The border, field by field: what is read from a ScoredData dict, and what is refused by which name."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest

from atropos_exp.parts.atropos.scored_data import Rejected, ScoredGroup, read_group

VOCAB, LONGEST = 50, 12


def good() -> dict[str, Any]:
    """Two sequences; the first one has two turns with a tool's token (7) between them."""
    return {
        "tokens": [[1, 2, 3, 7, 4, 5], [1, 2, 6, 5]],
        "masks": [[-100, -100, 3, -100, 4, 5], [-100, -100, 6, 5]],
        "scores": [1.0, 0.0],
        "advantages": None,
        "ref_logprobs": None,
        "messages": None,
        "generation_params": None,
        "inference_logprobs": [[1.0, 1.0, -0.5, 1.0, -0.25, -2.0], [1.0, 1.0, -1.5, -0.125]],
        "overrides": None,
        "group_overrides": None,
        "images": None,
        "env_id": 3,
        "distill_token_ids": None,
        "distill_logprobs": None,
    }


def read(raw: object) -> ScoredGroup:
    return read_group(raw, vocab_size=VOCAB, max_tokens=LONGEST)


def test_a_group_is_read_as_it_was_sent() -> None:
    group = read(good())
    first, second = group.sequences
    assert (group.env_id, group.unknown) == (3, ())
    assert first.token_ids.tolist() == [1, 2, 3, 7, 4, 5]
    assert first.trained.tolist() == [False, False, True, False, True, True]
    assert first.logprobs is not None
    assert first.logprobs.tolist() == [0.0, 0.0, -0.5, 0.0, -0.25, -2.0], "the sentinel is no logprob"
    assert (first.score, second.score) == (1.0, 0.0)
    assert first.advantages is None and first.reference_logprobs is None and first.temperature is None
    assert not (first.supervised or first.zero_advantage)


def test_token_zero_can_be_trained() -> None:
    raw = good() | {"tokens": [[1, 0]], "masks": [[-100, 0]], "scores": [1], "inference_logprobs": None}
    assert read(raw).sequences[0].trained.tolist() == [False, True]


def test_the_first_token_is_never_trained() -> None:
    raw = good()
    raw["masks"][1] = [1, -100, 6, 5]
    assert read(raw).sequences[1].trained.tolist() == [False, False, True, True]


@pytest.mark.parametrize("absent", [None, []])
@pytest.mark.parametrize("name", ["advantages", "inference_logprobs", "ref_logprobs", "overrides"])
def test_null_and_an_empty_list_mean_absent(name: str, absent: Any) -> None:
    first = read(good() | {name: absent}).sequences[0]
    assert first.advantages is None
    assert first.reference_logprobs is None
    assert (first.logprobs is None) == (name == "inference_logprobs")


def test_supplied_values_are_taken_verbatim_where_tokens_are_trained() -> None:
    raw = good()
    raw["advantages"] = [[9.0, 9.0, 0.5, 9.0, -0.25, 2.0], [0.0, 0.0, 1.0, -1.0]]
    raw["ref_logprobs"] = [[0.0, 0.0, -1.0, 5.0, -2.0, -3.0], [0.0, 0.0, -1.0, -1.0]]
    first = read(raw).sequences[0]
    assert first.advantages is not None and first.reference_logprobs is not None
    assert first.advantages.tolist() == [0.0, 0.0, 0.5, 0.0, -0.25, 2.0]
    assert first.reference_logprobs.tolist() == [0.0, 0.0, -1.0, 0.0, -2.0, -3.0]


def test_non_finite_numbers_where_nothing_is_trained_do_no_harm() -> None:
    raw = good()
    raw["inference_logprobs"][0][3] = math.nan
    first = read(raw).sequences[0]
    assert first.logprobs is not None and np.isfinite(first.logprobs).all()


def test_overrides() -> None:
    raw = good()
    raw["overrides"] = [{"set_advantage_to_zero": True, "temperature": 0.7}, {"sft": True, "colour": "red"}]
    group = read(raw)
    first, second = group.sequences
    assert (first.zero_advantage, first.supervised, first.temperature) == (True, False, 0.7)
    assert (second.zero_advantage, second.supervised, second.temperature) == (False, True, None)
    assert group.unknown == ("overrides.colour",)


def test_group_overrides_and_generation_parameters() -> None:
    raw = good() | {"group_overrides": {"sft": True, "group_size": 2}, "generation_params": {"temperature": 0.0}}
    raw["advantages"] = [[0.0] * 6, [0.0] * 4]
    group = read(raw)
    assert [sequence.supervised for sequence in group.sequences] == [True, True]
    assert [sequence.advantages for sequence in group.sequences] == [None, None], "supervised: advantage 1 everywhere"
    assert [sequence.temperature for sequence in group.sequences] == [1.0, 1.0], "greedy logprobs are of temperature 1"
    assert group.unknown == ()


def test_the_narrowest_word_on_temperature_counts() -> None:
    raw = good() | {"group_overrides": {"temperature": 0.5}, "generation_params": {"temperature": 0.8}}
    raw["overrides"] = [{"temperature": 0.7}, None]
    group = read(raw)
    assert [sequence.temperature for sequence in group.sequences] == [0.7, 0.5]
    assert group.unknown == ()


@pytest.mark.parametrize(
    ("masks", "words"),
    [
        ([[0, 0, 1, 0, 1, 1], [0, 0, 1, 1]], r"sequence 0: .* or the token's own id \(trained\); these are 0 and 1"),
        ([[-100, -100, 3, -100, 4, 5], [-100, -100, 6, 4]], r"sequence 1: .*; token 3 is 5, its mask value 4"),
    ],
)
def test_a_wrong_mask_is_named(masks: list[list[int]], words: str) -> None:
    with pytest.raises(Rejected, match=words):
        read(good() | {"masks": masks})


def test_a_trained_token_with_the_sentinel_has_no_logprob() -> None:
    raw = good()
    raw["inference_logprobs"][1][2] = 1.0
    group = read(raw)
    assert group.sequences[1].logprobs is None
    assert group.sequences[0].logprobs is not None


BAD: list[tuple[str, dict[str, Any]]] = [
    ("malformed", {"tokens": None}),
    ("malformed", {"tokens": "123"}),
    ("malformed", {"tokens": [[1.5, 2.0], [1, 2]], "masks": [[-100, 2], [-100, 2]]}),
    ("malformed", {"tokens": [[[1]], [1, 2]]}),
    ("malformed", {"tokens": [[True, True], [1, 2]], "masks": [[-100, 1], [-100, 2]]}),
    ("malformed", {"scores": ["a", 1.0]}),
    ("malformed", {"scores": [[1.0], [2.0]]}),
    ("malformed", {"overrides": ["zero", "zero"]}),
    ("malformed", {"group_overrides": [1]}),
    ("empty", {"tokens": [], "masks": [], "scores": []}),
    ("lengths", {"scores": [1.0]}),
    ("lengths", {"masks": [[-100, -100, 3, -100, 4, 5]]}),
    ("lengths", {"masks": [[-100, -100, 3, -100, 4], [-100, -100, 6, 5]]}),
    ("lengths", {"inference_logprobs": [[1.0, 1.0], [1.0, 1.0, -1.0, -1.0]]}),
    ("lengths", {"inference_logprobs": [[1.0, 1.0, -0.5, 1.0, -0.25, -2.0]]}),
    ("lengths", {"advantages": [[1.0], [1.0]]}),
    ("lengths", {"advantages": [1.0, 1.0]}),
    ("lengths", {"overrides": [{}]}),
    ("too_long", {"tokens": [[1] * 13, [1, 2]], "masks": [[1] * 13, [-100, 2]], "inference_logprobs": None}),
    ("token_id", {"tokens": [[1, 2, 50, 7, 4, 5], [1, 2, 6, 5]]}),
    ("token_id", {"tokens": [[1, 2, -3, 7, 4, 5], [1, 2, 6, 5]]}),
    ("token_id", {"tokens": [[1, 2, 2**62, 7, 4, 5], [1, 2, 6, 5]]}),
    ("mask_value", {"masks": [[0, 0, 1, 0, 1, 1], [-100, -100, 6, 5]]}),
    ("mask_value", {"masks": [[-100, -100, 4, -100, 4, 5], [-100, -100, 6, 5]]}),
    ("non_finite", {"scores": [math.nan, 1.0]}),
    ("non_finite", {"scores": [math.inf, 1.0]}),
    ("range", {"scores": [1e300, 1.0]}),
    ("range", {"advantages": [[0.0, 0.0, 1e18, 0.0, 0.0, 0.0], [0.0] * 4]}),
    ("range", {"inference_logprobs": [[1.0, 1.0, -1e5, 1.0, -0.25, -2.0], [1.0, 1.0, -1.5, -0.125]]}),
    ("range", {"ref_logprobs": [[0.0, 0.0, -1e18, 0.0, -0.25, -2.0], [0.0, 0.0, -1.5, -0.125]]}),
    ("non_finite", {"inference_logprobs": [[1.0, 1.0, -math.inf, 1.0, -0.25, -2.0], [1.0, 1.0, -1.5, -0.125]]}),
    ("non_finite", {"advantages": [[0.0, 0.0, math.nan, 0.0, 0.0, 0.0], [0.0] * 4]}),
    ("no_trained_token", {"masks": [[-100] * 6, [-100, -100, 6, 5]]}),
    ("no_trained_token", {"masks": [[1, -100, -100, -100, -100, -100], [-100, -100, 6, 5]]}),
    ("multimodal", {"images": ["base64"]}),
    ("distillation", {"distill_token_ids": [[[1]], [[1]]]}),
    ("distillation", {"distill_logprobs": [[[0.0]], [[0.0]]]}),
    ("temperature", {"generation_params": {"temperature": -1.0}}),
    ("temperature", {"overrides": [{"temperature": 1e-40}, {}]}),
    ("temperature", {"group_overrides": {"temperature": 1e-38}}),
    ("temperature", {"group_overrides": {"temperature": math.nan}}),
    ("temperature", {"overrides": [{"temperature": 101}, {}]}),
]


@pytest.mark.parametrize(("reason", "change"), BAD, ids=lambda value: str(value)[:60])
def test_a_bad_group_is_refused_by_name(reason: str, change: dict[str, Any]) -> None:
    with pytest.raises(Rejected) as refused:
        read(copy.deepcopy(good()) | change)
    assert refused.value.reason == reason


def test_dummy_tokens_are_refused() -> None:
    raw = good() | {
        "tokens": [list(range(128))],
        "masks": [[-100, *range(1, 128)]],
        "scores": [1.0],
        "inference_logprobs": [[-0.5] * 128],
    }
    with pytest.raises(Rejected) as refused:
        read_group(raw, vocab_size=1000, max_tokens=1000)
    assert refused.value.reason == "dummy_tokens"


@pytest.mark.parametrize("raw", [None, [], "text", 3, {}, {"tokens": {}}])
def test_nonsense_is_refused_and_nothing_else_is_raised(raw: object) -> None:
    with pytest.raises(Rejected):
        read(raw)
