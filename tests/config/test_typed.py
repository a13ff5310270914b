"""Typed construction: values take the types of their fields, or every mistake is named."""

from __future__ import annotations

import enum
from typing import Any, Self

import pytest
from pydantic import model_validator

from atropos_exp.config.settings import Settings
from atropos_exp.config.typed import Mistake, construct
from atropos_exp.errors import UserError


class Shape(enum.Enum):
    ROUND = "round"
    FLAT = "flat"


class Inner(Settings):
    rank: int
    names: list[str]


class Outer(Settings):
    count: int
    rate: float
    on: bool
    label: str | None
    shape: Shape
    inner: Inner
    maybe: Inner | None
    bounds: list[float] | None
    weights: dict[str, float]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.rate < 0:
            raise UserError(f"rate: got {self.rate}, expected 0 or more")
        return self


GOOD: dict[str, Any] = {
    "count": 3,
    "rate": "1e-3",
    "on": True,
    "label": None,
    "shape": "ROUND",
    "inner": {"rank": 8, "names": ["q", "v"]},
    "maybe": None,
    "bounds": [-1, 2.5],
    "weights": {"a": 1},
}


def made(**changes: Any) -> tuple[Any, list[tuple[str, str]]]:
    mistakes: list[Mistake] = []
    part = construct(Outer, {**GOOD, **changes}, "outer", mistakes)
    return part, [(mistake.path, mistake.message) for mistake in mistakes]


def test_values_take_the_types_of_their_fields() -> None:
    part, mistakes = made()
    assert mistakes == []
    assert part == Outer(
        count=3,
        rate=0.001,
        on=True,
        label=None,
        shape=Shape.ROUND,
        inner=Inner(rank=8, names=["q", "v"]),
        maybe=None,
        bounds=[-1.0, 2.5],
        weights={"a": 1.0},
    )
    assert isinstance(part.weights["a"], float)
    assert made(maybe={"rank": 1, "names": []})[0].maybe == Inner(rank=1, names=[])


@pytest.mark.parametrize(
    ("changes", "path", "words"),
    [
        ({"count": "many"}, "outer.count", "got 'many', expected a whole number"),
        ({"count": 2.5}, "outer.count", "got 2.5, expected a whole number"),
        ({"count": True}, "outer.count", "got True, expected a whole number"),
        ({"count": None}, "outer.count", "got null, expected a whole number"),
        ({"rate": "banana"}, "outer.rate", "got 'banana', expected a number"),
        ({"label": "${nowhere}"}, "outer.label", "got '${nowhere}', expected text, or null"),
        ({"label": "???"}, "outer.label", "got '???', expected text, or null"),
        ({"label": 1e3}, "outer.label", "got 1000.0, expected text, or null, so put it in quotes"),
        ({"on": "maybe"}, "outer.on", "expected true or false"),
        ({"shape": "SQUARE"}, "outer.shape", "got 'SQUARE', expected one of ROUND, FLAT"),
        ({"bounds": 3}, "outer.bounds", "got 3, expected a list (each item a number), or null"),
        ({"bounds": [1, "x"]}, "outer.bounds", "expected a list (each item a number), or null"),
        ({"weights": {"a": "x"}}, "outer.weights", "expected a mapping (each value a number)"),
        ({"inner": {"rank": "x", "names": []}}, "outer.inner.rank", "got 'x', expected a whole number"),
        ({"inner": {"rank": 1}}, "outer.inner.names", "missing"),
        ({"inner": {"rank": 1, "names": [], "nmaes": 1}}, "outer.inner.nmaes", "Did you mean 'outer.inner.names'?"),
        ({"inner": 4}, "outer.inner", "got 4, expected a mapping"),
        ({"maybe": {"rank": None, "names": []}}, "outer.maybe.rank", "got null, expected a whole number"),
        ({"cuont": 3}, "outer.cuont", "unknown key. Did you mean 'outer.count'?"),
        ({"zzz": 3}, "outer.zzz", "unknown key."),
        ({"rate": -1}, "outer.rate", "got -1.0, expected 0 or more"),
        ({"weights": {"_target_": "os.system"}}, "outer.weights._target_", "refused"),
        ({"weights": {"a": {"_partial_": True}}}, "outer.weights.a._partial_", "refused"),
        ({"_partial_": True}, "outer._partial_", "unknown key"),
        ({"_args_": [1]}, "outer._args_", "unknown key"),
    ],
)
def test_one_mistake_is_named(changes: dict[str, Any], path: str, words: str) -> None:
    part, mistakes = made(**changes)
    assert part is None
    assert len(mistakes) == 1
    assert mistakes[0][0] == path
    assert words in mistakes[0][1]


def test_all_mistakes_are_named() -> None:
    _, mistakes = made(count="x", shape="x", inner={"rank": "x", "names": "x"}, cuont=1)
    paths = ["outer.cuont", "outer.count", "outer.shape", "outer.inner.rank", "outer.inner.names"]
    assert [path for path, _ in mistakes] == paths
