"""Each cause of a stall is named, with what to do."""

from __future__ import annotations

from typing import Any

import pytest

from atropos_exp.parts.atropos.stall import explain

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
}


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
    ],
)
def test_the_cause_is_named(facts: dict[str, Any], words: str) -> None:
    text = explain(**{**FACTS, **facts})
    assert text.startswith("the Atropos API has formed no batch for 61 s")
    assert words in text
