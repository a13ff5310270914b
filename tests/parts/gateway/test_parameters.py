"""Fields of a body, and settings: what is taken, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from atropos_exp.config.origin import CONF_DIR
from atropos_exp.errors import UserError
from atropos_exp.parts.gateway.counters import GAUGES, TOTALS, prometheus
from atropos_exp.parts.gateway.dialects.fields import Fields, token_ids
from atropos_exp.parts.gateway.refusal import Refusal
from atropos_exp.parts.gateway.sampler import Seeds
from atropos_exp.parts.gateway.settings import GatewaySettings


def test_fields_are_the_keys_of_the_yaml() -> None:
    values = yaml.safe_load((CONF_DIR / "gateway/default.yaml").read_text())
    assert set(GatewaySettings.model_fields) == values.keys() - {"_target_"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"host": "0.0.0.0"}, "which others can reach, without a token"),
        ({"token": "short"}, "at least 8 characters"),
        ({"max_hold_seconds": 600.0, "request_timeout_seconds": 599.0}, "below 600"),
        ({"request_timeout_seconds": 600.0}, "below 600"),
        ({"max_hold_seconds": 300.0, "request_timeout_seconds": 200.0}, "at least max_hold_seconds"),
        ({"port": 70000}, "1 to 65,535"),
        ({"ledger_tokens": 10}, "at least 1,000"),
    ],
)
def test_wrong_settings_are_refused(changes: dict[str, Any], message: str, helpers: Any) -> None:
    with pytest.raises(UserError, match=message):
        helpers.settings(**changes)
    helpers.settings(host="0.0.0.0", token="a long secret")


def test_a_ledger_that_forgets_a_batch_before_it_comes_back_is_refused(helpers: Any) -> None:
    """512 groups of 16 completions of 1,000 tokens weigh 512 x 16 x (1000 + 48) = 8,585,216."""
    facts = {"uses_atropos": True, "batch_size": 512, "group_size": 16, "max_response_length": 1000}
    [problem] = helpers.settings(ledger_tokens=8_585_215).preflight(**facts)
    assert problem.startswith("ledger_tokens: got 8585215, but one batch has up to 512 x 16 completions of 1000 tokens")
    assert "expected at least 8585216, or null" in problem
    assert list(helpers.settings(ledger_tokens=8_585_216).preflight(**facts)) == []
    assert list(helpers.settings(ledger_tokens=1000).preflight(**{**facts, "uses_atropos": False})) == []
    assert list(helpers.settings(ledger_tokens=None).preflight(**facts)) == []


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "non-empty list of token ids"),
        ("abc", "non-empty list of token ids"),
        ([1, "a"], "non-empty list of token ids"),
        ([1.5], "non-empty list of token ids"),
        ([[1], [2, 3]], "non-empty list of token ids"),
        ([1 << 31], "got 2147483648"),
        ([3, -1], "got -1"),
        ([1 << 70], "non-empty list of token ids"),
    ],
)
def test_what_is_no_list_of_token_ids(value: Any, message: str) -> None:
    with pytest.raises(Refusal, match=message) as caught:
        token_ids(value, "prompt")
    assert caught.value.status == 400 and caught.value.param == "prompt"


def test_numbers() -> None:
    fields = Fields({"a": 1, "b": 2.5, "c": 3.0, "d": None, "e": 7})
    assert fields.number("a", 0.0, 0, 10) == 1.0 and fields.number("b", 0.0, 0, 10) == 2.5
    assert fields.integer("c", None, 0, 10) == 3
    assert fields.integer("d", None, 0, 10) is None and fields.number("d", 0.5, 0, 10) == 0.5
    assert fields.count("e", 1, 0, 10) == 7
    fields.finish()
    for value in (True, "1", [1], float("nan"), 11, -1):
        with pytest.raises(Refusal, match="from 0 to 10"):
            Fields({"x": value}).number("x", 0.0, 0, 10)
        with pytest.raises(Refusal, match="from 0 to 10"):
            Fields({"x": value}).integer("x", None, 0, 10)
    with pytest.raises(Refusal, match=r"whole number from 0 to 10; got 1\.5"):
        Fields({"x": 1.5}).integer("x", None, 0, 10)


def test_what_is_left_over_is_refused_by_name() -> None:
    Fields({"presence_penalty": 0, "min_p": 0.0, "logit_bias": {}, "user": "me", "whatever": None}).finish()
    for name, value in (("presence_penalty", 0.5), ("logit_bias", {"1": 5}), ("stream", True), ("nonsense", 1)):
        with pytest.raises(Refusal, match=f"sampling_params.{name}=.* is not supported") as caught:
            Fields({name: value}, prefix="sampling_params.").finish()
        assert caught.value.reason == "parameter" and caught.value.param == f"sampling_params.{name}"
    assert len(str(Refusal(400, "value", "x"))) == 1
    with pytest.raises(Refusal) as caught:
        Fields({"nonsense": "x" * 10_000}).finish()
    assert len(str(caught.value)) < 200


def test_seeds_never_repeat() -> None:
    def drawn(seed: int, incarnation: int) -> list[int]:
        seeds = Seeds(seed, incarnation)
        return [next(seeds) for _ in range(2000)]

    runs = {key: drawn(*key) for key in ((0, 0), (0, 1), (1, 0))}
    assert len({seed for seeds in runs.values() for seed in seeds}) == 6000
    assert drawn(0, 1) == runs[0, 1]
    assert all(0 <= seed < 1 << 63 for seed in runs[0, 0])
    ones = sum(bin(seed).count("1") for seed in runs[0, 0]) / (2000 * 63)
    assert abs(ones - 0.5) < 0.01


def test_counters_have_one_name_each_and_a_text_form() -> None:
    assert len({*TOTALS, *GAUGES}) == len(TOTALS) + len(GAUGES)
    assert prometheus({"requests": 3, "in_flight": 1}) == (
        "# TYPE atropos_exp_gateway_requests_total counter\natropos_exp_gateway_requests_total 3\n"
        "# TYPE atropos_exp_gateway_in_flight gauge\natropos_exp_gateway_in_flight 1\n"
    )
