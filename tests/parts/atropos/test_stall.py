"""Each cause of a stall is named, with what to do."""

from __future__ import annotations

from typing import Any

import pytest

from atropos_exp.parts.atropos.stall import Stall

FACTS: dict[str, Any] = {
    "seconds": 61.4,
    "batch_size": 12,
    "group_size": 4,
    "queued_groups": 0,
    "num_environments": 1,
    "has_minimum": False,
    "silent": [],
    "services": "environment e: process 5, registered",
    "logs": {},
    "max_token_len": 41,
    "num_lost": 0,
    "lost_to": "",
    "num_received": 0,
    "dropped": {},
    "examples": {"mask_value": "mask_value: sequence 0 …", "stale": "stale: …"},
    "errors": {},
    "gateway": {"gateway/requests_chat": 9.0, "gateway/completions": 9.0},
    "refusals": {},
}
LOST = "GET /batch answered 500"


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"num_environments": 0}, "no environment has registered with it (environment e: process 5, registered)"),
        ({"queued_groups": 7}, "7 groups are queued. A batch must have exactly 12 sequences"),
        ({"queued_groups": 7}, "an environment that sends another size blocks all"),
        ({"queued_groups": 7, "has_minimum": True, "silent": [1]}, "minimum allocation (--env.min_batch_allocation)"),
        ({"queued_groups": 7, "has_minimum": True, "silent": [1, 2]}, "Nothing is queued of environment 1, 2 ("),
        ({"logs": {"e": "WARNING Token length is too long in a group, skipping"}}, "e drops its groups because a"),
        ({"logs": {"e": "Token length is too long"}}, "41 tokens or more"),
        ({"logs": {"e": "Group structure invalid, or token count mismatch"}}, "e refuses its own groups"),
        ({"logs": {"e": "Scores are the same in a group, skipping..."}}, "ensure_scores_are_not_same false"),
        ({}, "1 environments have registered and send nothing"),
        (
            {"gateway": {"gateway/requests_health": 5.0}},
            "None has asked the gateway for a completion: one",
        ),
        ({"gateway": {"gateway/requests_chat": 5.0}}, "None of their requests has been answered with a completion"),
        (
            {"refusals": {"length": "the prompt has 90 tokens"}, "gateway": {"gateway/refused_length": 7.0}},
            "; the gateway has refused 7 requests, the first of them: the prompt has 90 tokens (raise max_prompt",
        ),
        ({"errors": {"e": "KeyError: 'x'"}}, "; the first error in the log of e: KeyError: 'x'"),
    ],
)
def test_the_cause_is_named(facts: dict[str, Any], words: str) -> None:
    text = Stall(**{**FACTS, **facts}).explain()
    assert text.startswith("the Atropos API has formed no batch for 61 s")
    assert words in text


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"num_lost": 40, "lost_to": LOST}, f"40 batches were lost ({LOST})"),
        (
            {"num_received": 9, "dropped": {"mask_value": 6, "stale": 3}},
            "9 of 9 groups were dropped (mask_value 6, stale 3), for instance: mask_value: sequence 0 …",
        ),
        (
            {"num_lost": 1, "lost_to": LOST, "num_received": 2, "dropped": {"stale": 2}},
            f"1 batches were lost ({LOST}); 2 of 2 groups were dropped (stale 2), for instance: stale: …",
        ),
    ],
)
def test_what_came_to_nothing_is_the_cause_though_environments_send(facts: dict[str, Any], words: str) -> None:
    text = Stall(**{**FACTS, **facts}).explain()
    assert text == f"nothing that can be trained on has come from Atropos for 61 s: {words}"
