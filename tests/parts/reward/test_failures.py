"""Answers that cannot be scored cost their own rollout, with one traceback; a reward that scores nothing ends a run."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from atropos_exp.errors import UserError
from atropos_exp.parts.reward.pool import RewardPool
from atropos_exp.types import Prompt, RewardFailure
from tests.helpers.answer_forms import prompt
from tests.helpers.experiments import command, metrics, summary
from tests.helpers.paths import ROOT
from tests.parts.reward.misbehaving import Obedient

PROMPTS = [replace(prompt("2"), prompt_id=f"p/{at}") for at in range(4)]


def items(*answers: str) -> list[tuple[str, Prompt]]:
    return [(answer, one) for one in PROMPTS for answer in answers]


def test_the_first_traceback_of_each_kind_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    with RewardPool(Obedient(), num_workers=2, timeout_seconds=5.0) as pool:
        results = pool.score(items("raise value", "raise value", "raise exit", "four"))
    reasons = [result.reason if isinstance(result, RewardFailure) else result for result in results]
    assert reasons == ["error:ValueError", "error:ValueError", "error:SystemExit", 4.0] * 4
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2, "one of each kind, though there were twelve"
    [value] = [text for text in said if "error:ValueError" in text]
    assert "Traceback (most recent call last):" in value and "do_raise" in value and "ValueError: xxxxxxxxx" in value
    assert "_score" not in value, "it begins in the reward"


def test_a_reward_that_scores_nothing_ends_it() -> None:
    with RewardPool(Obedient(), num_workers=1, timeout_seconds=5.0) as pool:
        pool.score(items("raise value")[:3] * 8)  # three prompts, whatever happens to them
        with pytest.raises(
            UserError,
            match=r"(?s)Obedient could score none of 28 answers in a row, to 4 prompts \(error:ValueError 27×, "
            r"error:SystemExit 1×\), the last one for SystemExit: xxxxxxxxx\. .*\nTraceback ",
        ):
            pool.score([("raise value", PROMPTS[3])] * 3 + [("raise exit", PROMPTS[3])])


def test_one_that_is_scored_is_enough_to_go_on() -> None:
    with RewardPool(Obedient(), num_workers=1, timeout_seconds=5.0) as pool:
        for _ in range(3):
            pool.score([*items(*["raise value"] * 3), ("four", PROMPTS[0])])
        pool.score(items(*["raise value"] * 3))  # twelve answers


def test_a_run_without_a_single_reward_fails_with_the_traceback(tmp_path: Path) -> None:
    """Ground truths that are no numbers, for the reward that compares numbers."""
    from hydra import compose, initialize_config_dir

    from atropos_exp.run import run

    row = {
        "data_source": "towns", "prompt": [{"role": "user", "content": "Where?"}], "ability": "towns",
        "reward_model": {"style": "rule", "ground_truth": "Paris"}, "extra_info": {"index": 0},
    }  # fmt: skip
    rows = [{**row, "extra_info": {"index": index}} for index in range(8)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "towns.parquet")
    overrides = command(
        tmp_path / "run", "data.prepare=null", f"data.parquet_paths={tmp_path / 'towns.parquet'}", "reward=numeric",
        "eval.num_prompts=0", "trainer.max_steps=3", "max_prompt_length=64",
    )[3:]  # fmt: skip
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        config = compose("config", overrides=overrides)
    with pytest.raises(UserError, match="could score none of 16 answers in a row"):
        run(config)
    found = summary(tmp_path / "run")
    assert found["status"] == "failed"
    assert re.search(
        r"(?s)4 prompts \(error:ValueError 16×\), .* ValueError: ground truth 'Paris' .* is not a number",
        found["error"],
    )
    assert [row["step"] for row in metrics(tmp_path / "run")] == [0]
