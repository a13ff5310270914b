"""`conf/atropos`: which Atropos API a run trains from, and how patient it is."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from atropos_exp.config.typed import Ranges, check_ranges

SECONDS = "seconds above 0"


def _positive(value: float) -> bool:
    return 0 < value < math.inf


@dataclass(frozen=True, kw_only=True)
class AtroposSettings:
    """The settings of `conf/atropos`, in seconds where they are times. `launch.start_programs` acts on them."""

    api_url: str | None
    launch: bool
    timeout: float
    start_timeout: float
    data_timeout: float
    batch_timeout: float
    take_over: bool
    max_version_lag: int | None
    max_restarts: int
    extra_ports: list[int]

    RANGES: ClassVar[Ranges] = {
        "api_url": (
            lambda url: url is None or re.fullmatch(r"https?://[^/\s]+(/\S*)?", url) is not None,
            "http://HOST:PORT, or null",
        ),
        "timeout": (_positive, SECONDS),
        "start_timeout": (_positive, SECONDS),
        "data_timeout": (_positive, SECONDS),
        "batch_timeout": (lambda value: 120 <= value < math.inf, "at least 120 seconds: hanging up loses the batch"),
        "max_version_lag": (lambda lag: lag is None or lag >= 0, "0 or more, or null (no limit)"),
        "max_restarts": (lambda count: count >= 0, "0 or more"),
        "extra_ports": (lambda ports: all(1 <= port <= 65535 for port in ports), "ports, 1 to 65535 each"),
    }

    def __post_init__(self) -> None:
        check_ranges(self)

    def preflight(self, *, uses_atropos: bool) -> Iterator[str]:
        """What stands in the way of using Atropos at all."""
        import importlib.util

        if not uses_atropos:
            return
        if self.api_url is None and not self.launch:
            yield "api_url: got null with launch=false, so there is no API to use; set one of them, or rollout=local"
        if self.launch and importlib.util.find_spec("atroposlib") is None:
            yield (
                "launch: got true, but atroposlib is not installed here; "
                "pip install atroposlib==0.4.0, set launch=false, or rollout=local"
            )
