"""The space of a search, frozen: every choice of groups composed beforehand, so that trials need no YAML file."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from atropos_exp.assembly.check import Checked, check
from atropos_exp.config.origin import Origin, report
from atropos_exp.config.typed import Mistake
from atropos_exp.errors import UserError
from atropos_exp.sweep.axes import Interval, plain_value

MOST_BASES = 256  # combinations of group options
# The configuration of a point (key -> override text) and where its values come from; None if it cannot be composed.
Composer = Callable[[Mapping[str, str]], tuple[DictConfig, Origin] | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchPlan:
    """What trials choose from: for each key a list of values or an interval.

    `bases` has a configuration, interpolations kept, for each combination of the options of `groups`.
    """

    space: dict[str, list[Any] | Interval]
    groups: list[str]
    bases: list[dict[str, Any]]  # in the order of itertools.product over the groups' choices

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> SearchPlan:
        """Return the plan that `to_json` has written."""
        space = {key: Interval(**item) if isinstance(item, dict) else item for key, item in content["space"].items()}
        return cls(**{**content, "space": space})

    def config(self, values: Mapping[str, Any]) -> DictConfig:
        """Return the configuration of one choice. Raises UserError for a key that the chosen groups do not have."""
        choices = [_choices(self.space[group]) for group in self.groups]
        chosen = tuple(values[group] for group in self.groups)
        at = next(at for at, combination in enumerate(itertools.product(*choices)) if combination == chosen)
        config = OmegaConf.create(self.bases[at])
        assert isinstance(config, DictConfig)
        OmegaConf.set_struct(config, True)
        for key, value in values.items():
            if key in self.groups:
                continue
            try:
                OmegaConf.update(config, key.lstrip("+"), value, force_add=key.startswith("+"))
            except OmegaConfBaseException as error:
                message = str(error.msg or error).splitlines()[0]
                raise UserError(
                    f"{key}: {message} (with {', '.join(map(str, chosen)) or 'this configuration'})"
                ) from error
        OmegaConf.set_struct(config, False)
        return config


def plan_search(
    space: Mapping[str, tuple[str, ...] | Interval], groups: Sequence[str], composer: Composer
) -> tuple[SearchPlan, Checked] | None:
    """Compose all bases and check the corners of the space: both ends of each interval, each choice of each key.

    Returns the plan and the last corner; None if the composer could not compose a base. Raises UserError with what is
    wrong at a corner.
    """
    options = []
    for group in groups:
        texts = space[group]
        if not isinstance(texts, tuple):
            raise UserError(f"{group}: got an interval, expected options to choose from")
        options.append(texts)
    if math.prod(map(len, options)) > MOST_BASES:
        raise UserError(f"sweep.space: more than {MOST_BASES} combinations of {', '.join(groups)}")
    combinations = list(itertools.product(*options))
    composed = [found for texts in combinations if (found := composer(dict(zip(groups, texts, strict=True))))]
    if len(composed) < len(combinations):
        return None
    bases: Any = [OmegaConf.to_container(config, resolve=False) for config, _ in composed]
    plain = {key: item if isinstance(item, Interval) else [plain_value(text) for text in item]
             for key, item in space.items()}  # fmt: skip
    plan = SearchPlan(space=plain, groups=list(groups), bases=bases)
    messages: dict[str, None] = {}
    checked: Checked | None = None
    choices = itertools.product(*(_choices(plain[group]) for group in groups))
    for chosen, (_, origin) in zip(choices, composed, strict=True):
        for corner in _corners(plain, groups):
            mistakes: list[Mistake]
            try:
                checked, mistakes = check(plan.config({**dict(zip(groups, chosen, strict=True)), **corner}))
            except UserError as error:
                mistakes = [Mistake(path="", message=str(error))]
            if mistakes:
                messages[report(mistakes, origin)] = None
    if messages:
        raise UserError("\n".join(messages))
    assert checked is not None
    return plan, checked


def _corners(space: Mapping[str, list[Any] | Interval], groups: Sequence[str]) -> list[dict[str, Any]]:
    """All keys at their first value; all at their last; and each in between, alone."""
    values = {key: _choices(item) for key, item in space.items() if key not in groups}
    first = {key: items[0] for key, items in values.items()}
    last = {key: items[-1] for key, items in values.items()}
    return [first, last, *({**first, key: item} for key, items in values.items() for item in items[1:])]


def _choices(item: list[Any] | Interval) -> list[Any]:
    if isinstance(item, Interval):
        return [int(item.low), int(item.high)] if item.integer else [float(item.low), float(item.high)]
    return item
