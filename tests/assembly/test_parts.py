"""The typed middle: what a part of one's own lacks is named before anything starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from atropos_exp.assembly.parts import lacking
from atropos_exp.parts.rollout.local import LocalRollout


@dataclass(frozen=True, kw_only=True)
class Half:
    """Some of what an engine offers."""

    dtype: str
    colocate: ClassVar[bool] = False
    lora: ClassVar[str] = "merged"


class Compares:
    """An advantage estimator without its smallest group."""

    def __call__(self, groups: Any) -> list[Any]:
        return []


@pytest.mark.parametrize(
    ("group", "part", "missing", "protocol"),
    [
        ("engine", Half(dtype="float32"), "max_restarts, start", "EnginePart"),
        ("advantage", Compares(), "min_group_size", "AdvantageEstimator"),
        ("reward", Compares(), "num_workers, timeout_seconds, warm_up", "RewardPart"),
        ("rollout", LocalRollout(mask_truncated=False), "", ""),
    ],
)
def test_what_a_part_lacks_is_named(group: str, part: object, missing: str, protocol: str) -> None:
    found = lacking(group, part)
    if not missing:
        assert found == ""
    else:
        name = f"{__name__}.{type(part).__qualname__}"
        assert found.startswith(f"{name} has no {missing}, which {protocol} ")


def test_where_there_is_one_option_its_class_is_wanted() -> None:
    expected = "expected a subclass of GatewaySettings"
    assert lacking("gateway", Half(dtype="float32")).endswith(expected)
