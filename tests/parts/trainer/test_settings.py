"""Settings, schedule, and what is refused before anything is loaded."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from atropos_exp.errors import UserError
from atropos_exp.parts.trainer.fsdp2 import VerlFSDP2
from atropos_exp.parts.trainer.schedule import learning_rate_factor
from atropos_exp.parts.trainer.settings import require_ranks
from tests.helpers.trainer_cases import SETTINGS, make_batch, settings, write_model


def test_yaml_and_dataclass_agree() -> None:
    assert set(VerlFSDP2.model_fields) == yaml.safe_load(SETTINGS.read_text()).keys() - {"_target_"}


def test_settings_import_no_framework() -> None:
    code = "import sys, atropos_exp.parts.trainer.fsdp2; print({'torch', 'verl', 'transformers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": 0}, "^max_steps: got 0, expected at least 1$"),
        ({"num_mini_batches": 0}, "^num_mini_batches: got 0, expected at least 1"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"scheduler": "cosin"}, "^scheduler: got 'cosin', expected one of constant, linear, cosine$"),
        ({"min_lr_ratio": 2.0}, "min_lr_ratio"),
        ({"adam_beta2": 1.0}, "adam_beta2"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"importance_cap": 0.0}, "importance_cap"),
        ({"max_bad_steps": 0}, "max_bad_steps"),
    ],
)
def test_bad_settings_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings(**changes)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_sequence_parallelism_refuses_attention_that_it_would_break(attention: str) -> None:
    parallel = settings(sequence_parallel_size=2)
    with pytest.raises(UserError, match=f"attn_implementation={attention} would attend to a part of each sequence"):
        parallel.attention(attention)
    assert parallel.attention("auto") == parallel.attention("packed") == "atropos_packed"
    assert settings().attention(attention) == attention


def test_ranks_and_heads_must_divide() -> None:
    require_ranks(4, 2, (4, 2))
    require_ranks(4, 4, (8, 2))  # key-value heads are repeated
    with pytest.raises(UserError, match="does not divide the 3 trainer processes"):
        require_ranks(3, 2, (4, 2))
    with pytest.raises(UserError, match="9 query heads"):
        require_ranks(2, 2, (9, 3))


# warm-up of 4 steps, 12 in all, down to a tenth: values worked out by hand
@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ("constant", {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 8: 1.0, 12: 1.0}),
        ("linear", {0: 0.25, 3: 1.0, 4: 1.0, 6: 0.775, 8: 0.55, 11: 0.2125, 12: 0.1, 20: 0.1}),
        ("cosine", {0: 0.25, 3: 1.0, 4: 1.0, 6: 0.1 + 0.9 * (2 + math.sqrt(2)) / 4, 8: 0.55, 12: 0.1, 20: 0.1}),
    ],
)
def test_schedule_by_hand(scheduler: str, expected: dict[int, float]) -> None:
    for step, factor in expected.items():
        actual = learning_rate_factor(step, scheduler=scheduler, warmup_steps=4, total_steps=12, min_ratio=0.1)
        assert actual == pytest.approx(factor), step


def test_the_trainer_follows_the_schedule(start: Any) -> None:
    trainer = start(learning_rate=0.4, scheduler="linear", warmup_steps=2, max_steps=4)
    rates = [trainer.update(make_batch()).learning_rate for _ in range(5)]
    assert rates == pytest.approx([0.2, 0.4, 0.4, 0.2, 0.0])


def test_a_folder_without_a_model_is_refused(start: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        start(tmp_path)


def test_a_key_that_the_architecture_does_not_know_changes_nothing(start: Any, tmp_path: Path) -> None:
    stray = start(write_model(tmp_path, final_logit_softcapping=0.5))
    sequences = [np.arange(1, 9, dtype=np.int32)]
    assert (stray.logprobs(sequences, temperature=1.0)[0] == start().logprobs(sequences, temperature=1.0)[0]).all()


def test_dropout_is_switched_off(start: Any, tmp_path: Path) -> None:
    noisy, plain = start(write_model(tmp_path, attention_dropout=0.5)), start()
    batch = make_batch()
    assert noisy.update(batch).grad_norm == plain.update(batch).grad_norm


@pytest.mark.parametrize("layout", ["rows", "single"])
def test_only_packed_sequences_are_shared_between_ranks(layout: str) -> None:
    with pytest.raises(UserError, match=f"layout: got {layout}, expected packed or auto"):
        settings(layout=layout, sequence_parallel_size=2)
    assert settings(layout="packed", sequence_parallel_size=2).layout == "packed"
