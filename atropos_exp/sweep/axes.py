"""What a sweep varies: Hydra's override grammar as lists of override texts or as intervals."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, ValueType
from hydra.errors import HydraException

from atropos_exp.errors import UserError

SEED = "seed"  # no axis: it repeats a point


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """Numbers from `low` to `high`, both included; whole ones if `integer`; drawn on a log scale if `log`."""

    low: float
    high: float
    integer: bool
    log: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class CommandLine:
    """The overrides of `-m`: those of every run, and those that vary."""

    fixed: tuple[str, ...]  # overrides of every run
    swept: Mapping[str, tuple[str, ...] | Interval]  # key -> values as override texts


def parse_command_line(overrides: Sequence[str], loader: Any) -> CommandLine:
    """Separate the overrides that vary from those of every run.

    `loader` is Hydra's config loader, which `glob(*)` needs. Raises HydraException for what cannot be parsed.
    """
    fixed: list[str] = []
    swept: dict[str, tuple[str, ...] | Interval] = {}
    for text, override in zip(overrides, OverridesParser.create(loader).parse_overrides(list(overrides)), strict=True):
        if override.is_sweep_override():
            swept[override.get_key_element()] = _values(override)
        elif override.key_or_group != "hydra.mode":
            fixed.append(text)
    return CommandLine(fixed=tuple(fixed), swept=swept)


def parse_space(key: str, value: Any) -> tuple[str, ...] | Interval:
    """Parse a value of `sweep.space` or `hydra.sweeper.params`: a list, or a text such as `interval(0, 1)`.

        parse_space("loss", ["grpo", "dr_grpo"])  # ("grpo", "dr_grpo")
        parse_space("trainer.learning_rate", "tag(log, interval(1e-5, 1e-3))")  # Interval(low=1e-5, high=1e-3, ...)

    Raises UserError for anything else.
    """
    if isinstance(value, list):
        if not value:
            raise UserError(f"{key}: got an empty list, expected values to choose from")
        return tuple(override_text(item) for item in value)
    try:
        override = OverridesParser.create().parse_override(f"{key}={value}")
    except HydraException as error:
        raise UserError(f"{key}: cannot read {value!r}: {str(error).splitlines()[0]}") from error
    if not override.is_sweep_override():
        raise UserError(f"{key}: got {value!r}, expected a list, or an interval such as interval(1e-5, 1e-3)")
    return _values(override)


def override_text(value: Any) -> str:
    """Write a YAML value in Hydra's override grammar."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{override_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(override_text, value)) + "]"
    if re.fullmatch(r"[A-Za-z_][\w./-]*", value) and value.lower() not in ("true", "false", "null", "nan", "inf"):
        return str(value)
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", str(value))
    return f"'{escaped}'"


def plain_value(text: str) -> Any:
    """Return the value of an override text: a number for `1e-4`, a string for `grpo`."""
    return OverridesParser.create().parse_override(f"key={text}").value()


def _values(override: Override) -> tuple[str, ...] | Interval:
    if override.value_type is not ValueType.INTERVAL_SWEEP:
        return tuple(override.sweep_string_iterator())
    interval = override.value()
    assert isinstance(interval, IntervalSweep) and interval.start is not None and interval.end is not None
    integer = isinstance(interval.start, int) and isinstance(interval.end, int)
    found = Interval(low=interval.start, high=interval.end, integer=integer, log="log" in interval.tags)
    if not found.low < found.high or (found.log and found.low <= 0):
        above = ", both above 0 for a log scale" if found.log else ""
        raise UserError(f"{override.key_or_group}: got an interval from {found.low} to {found.high}, expected the "
                        f"lower end first{above}")  # fmt: skip
    return found
