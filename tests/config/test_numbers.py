"""Every key of every option: a number that is not finite, negative, zero or huge, and text without a letter, is taken
as it is or refused in plain words, and no check of it takes long."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from functools import cache
from typing import Any, get_args, get_origin

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from atropos_exp.assembly.check import check
from atropos_exp.config.build import find_class
from atropos_exp.config.origin import CONF_DIR
from atropos_exp.config.root import GROUPS, RunConfig
from atropos_exp.config.settings import Settings
from atropos_exp.config.typed import Mistake, construct, strip_optional
from data_prep.prepare import BUILDERS, find

VALUES = (math.nan, math.inf, -math.inf, -1, 0, 1e30, -1e30, 10**12, "", " ", "nan", "-inf", "1e999")
FAR = (10**12, 1e30, -(10**12), -1e30)  # beyond the ends of every range
OPTIONS = sorted((path.parent.name, path.stem) for path in CONF_DIR.glob("*/*.yaml")
                 if path.parent.name in (*GROUPS, "sweep"))  # fmt: skip
CHECK_SECONDS = 2.0  # of one configuration; it takes some hundredths


@cache
def base() -> DictConfig:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF_DIR)):
        return compose("config")


def node_of(group: str, option: str) -> dict[str, Any]:
    """The values of an option, interpolations filled in."""
    config = base().copy()
    config[group] = OmegaConf.load(CONF_DIR / group / f"{option}.yaml")
    node: Any = OmegaConf.to_container(config, resolve=True)
    return dict(node[group])


def keys_of(cls: type[Settings], kinds: tuple[type, ...], path: tuple[str, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The keys that hold one of `kinds`, and whether they hold a list of them."""
    for name, field in cls.model_fields.items():
        _, kind = strip_optional(field.annotation)
        is_list = get_origin(kind) is list
        _, kind = strip_optional(get_args(kind)[0]) if is_list else (False, kind)
        if kind in kinds:
            yield (*path, name), is_list
        elif isinstance(kind, type) and issubclass(kind, Settings):
            yield from keys_of(kind, kinds, (*path, name))


def changed(values: dict[str, Any], key: tuple[str, ...], value: Any) -> dict[str, Any]:
    first, *rest = key
    return {**values, first: changed(values[first], tuple(rest), value) if rest else value}


def check_all(cls: type[Settings], values: dict[str, Any]) -> int:
    """Give every number of `cls` each of VALUES; returns how many keys there are."""
    keys = list(keys_of(cls, (int, float)))
    for key, is_list in keys:
        for value in VALUES:
            given = [value] if is_list else value
            mistakes: list[Mistake] = []
            made = construct(cls, changed(values, key, given), "group", mistakes)
            if made is None:
                found = [one.message for one in mistakes if one.path == ".".join(("group", *key))]
                shown = [f"got {given!r}, "]
                if value not in ("", " "):
                    shown.append(f"got {[float(value)]}, ")  # as read
                assert any(text.startswith(tuple(shown)) for text in found), mistakes
                assert any("expected" in text for text in found), mistakes
            else:
                assert mistakes == [] and value not in FAR, (key, value)
                for name in key:
                    made = getattr(made, name)
                for number in made if is_list else [made]:
                    assert math.isfinite(number) and number == float(value), key
    return len(keys)


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_an_option_takes_or_refuses_every_number(group: str, option: str) -> None:
    values = node_of(group, option)
    cls = find_class(values.pop("_target_"), group)
    made = construct(cls, values, group, mistakes := [])
    assert mistakes == [] and made is not None
    check_all(cls, values)


def test_the_root_takes_or_refuses_every_number() -> None:
    values = yaml.safe_load((CONF_DIR / "config.yaml").read_text())
    assert check_all(RunConfig, {key: values[key] for key in RunConfig.model_fields}) == 14


@pytest.mark.parametrize("name", BUILDERS)
def test_a_builder_takes_or_refuses_every_number(name: str) -> None:
    assert check_all(find(name), {}) >= 2


def last_accepted(cls: type[Settings], values: dict[str, Any], key: tuple[str, ...], is_list: bool) -> Iterator[Any]:
    """The largest power of ten that the key takes, and the smallest of -1, 0 and 1e-9."""
    for values_in_order in ([10**power for power in range(10, -1, -1)], [-(10**9), -1, 0, 1e-9]):
        for value in values_in_order:
            given = [value] if is_list else value
            if construct(cls, changed(values, key, given), "", []) is not None:
                yield given
                break


def test_the_ends_of_every_range_are_checked_at_once() -> None:
    """Also with what the whole configuration makes of them: sizes that divide, lengths that fit."""
    plain: Any = OmegaConf.to_container(base(), resolve=False)
    classes = [((), RunConfig), *(((group,), find_class(plain[group]["_target_"], group)) for group in GROUPS)]
    num_checked = 0
    for prefix, cls in classes:
        node = node_of(*_option(prefix)) if prefix else plain
        values = {key: node[key] for key in cls.model_fields}
        for key, is_list in keys_of(cls, (int, float)):
            for value in last_accepted(cls, values, key, is_list):
                assert_checked_at_once(changed(plain, (*prefix, *key), value), value)
                num_checked += 1
        for key, is_list in keys_of(cls, (str,)):
            for text in ("", " ", "-1"):
                assert_checked_at_once(changed(plain, (*prefix, *key), [text] if is_list else text), text)
    assert num_checked > 100


def _option(prefix: tuple[str, ...]) -> tuple[str, str]:
    (group,) = prefix
    root = yaml.safe_load((CONF_DIR / "config.yaml").read_text())
    return group, next(str(one[group]) for one in root["defaults"] if isinstance(one, dict) and group in one)


def assert_checked_at_once(values: dict[str, Any], value: object) -> None:
    started = time.monotonic()
    checked, mistakes = check(OmegaConf.create(values))
    assert time.monotonic() - started < CHECK_SECONDS, value
    assert (checked is None) == bool(mistakes)
    assert all("\n" not in one.message for one in mistakes)


def test_text_of_white_space_is_no_text() -> None:
    values = yaml.safe_load((CONF_DIR / "config.yaml").read_text())
    root = {key: values[key] for key in RunConfig.model_fields}
    assert construct(RunConfig, {**root, "output_dir": " "}, "", mistakes := []) is None
    assert [str(one) for one in mistakes] == ["output_dir: got ' ', expected a folder"]
