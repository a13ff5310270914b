"""Every number of every option: not finite, negative, zero or huge, it is taken as it is or refused in plain words."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, get_args, get_origin

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from atropos_exp.config.build import find_class
from atropos_exp.config.origin import CONF_DIR
from atropos_exp.config.root import GROUPS, RunConfig
from atropos_exp.config.settings import Settings
from atropos_exp.config.typed import Mistake, construct, strip_optional
from data_prep.prepare import BUILDERS, find

VALUES = (math.nan, math.inf, -math.inf, -1, 0, 1e30, "nan", "-inf", "1e999")
OPTIONS = sorted((path.parent.name, path.stem) for path in CONF_DIR.glob("*/*.yaml")
                 if path.parent.name in (*GROUPS, "sweep"))  # fmt: skip


def numbers(cls: type[Settings], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], bool]]:
    """The keys that hold a number, and whether they hold a list of them."""
    for name, field in cls.model_fields.items():
        _, kind = strip_optional(field.annotation)
        is_list = get_origin(kind) is list
        _, kind = strip_optional(get_args(kind)[0]) if is_list else (False, kind)
        if kind in (int, float):
            yield (*path, name), is_list
        elif isinstance(kind, type) and issubclass(kind, Settings):
            yield from numbers(kind, (*path, name))


def changed(values: dict[str, Any], key: tuple[str, ...], value: Any) -> dict[str, Any]:
    first, *rest = key
    return {**values, first: changed(values[first], tuple(rest), value) if rest else value}


def check_all(cls: type[Settings], values: dict[str, Any]) -> int:
    count = 0
    for key, is_list in numbers(cls):
        for value in VALUES:
            given = [value] if is_list else value
            mistakes: list[Mistake] = []
            made = construct(cls, changed(values, key, given), "group", mistakes)
            if made is None:
                found = [one.message for one in mistakes if one.path == ".".join(("group", *key))]
                shown = (f"got {given!r}, ", f"got {[float(value)]}, ")  # as typed, or as read
                assert any(text.startswith(shown) for text in found), mistakes
                assert any("expected" in text for text in found), mistakes
            else:
                assert mistakes == []
                for name in key:
                    made = getattr(made, name)
                for number in made if is_list else [made]:
                    assert math.isfinite(number) and number == float(value), key
            count += 1
    return count


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_an_option_takes_or_refuses_every_number(group: str, option: str) -> None:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF_DIR)):
        node: Any = OmegaConf.to_container(compose("config", overrides=[f"{group}={option}"]), resolve=True)
    target = node[group].pop("_target_")
    made = construct(find_class(target, group), node[group], group, mistakes := [])
    assert mistakes == [] and made is not None
    check_all(find_class(target, group), node[group])


def test_the_root_takes_or_refuses_every_number() -> None:
    values = yaml.safe_load((CONF_DIR / "config.yaml").read_text())
    assert check_all(RunConfig, {key: values[key] for key in RunConfig.model_fields}) == 14 * len(VALUES)


@pytest.mark.parametrize("name", BUILDERS)
def test_a_builder_takes_or_refuses_every_number(name: str) -> None:
    assert check_all(find(name), {}) >= 2 * len(VALUES)
