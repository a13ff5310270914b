"""What the gateway counts. Totals only grow; gauges are present values."""

import os
from collections.abc import Mapping

from atropos_exp.parts.gateway.refusal import REASONS

ROUTES = ("completions", "chat", "generate_vllm", "generate_sglang", "models", "health", "other")
TOTALS = (
    "requests",
    *(f"requests_{route}" for route in ROUTES),
    *(f"refused_{reason}" for reason in REASONS),
    "internal_errors",
    "disconnected",  # clients that went away before their answer
    "prompt_tokens",
    "completions",
    "completion_tokens",
    "clamped_max_tokens",  # requests that asked for more than the context had room for
    "clamped_logprobs",  # logprobs above 0 or -inf
    "stop_string_cuts",
    "failovers",  # requests that went on to another server of the engine because theirs was gone
    "held_requests",
    "held_seconds",
    "ledger_hits",
    "ledger_misses",
    "ledger_evicted",
)
GAUGES = ("in_flight", "max_in_flight", "holding", "ledger_entries", "ledger_tokens", "rss_bytes")


class Counters:
    """The gateway's counters: `totals` by the names in TOTALS, and the number of requests in flight."""

    def __init__(self) -> None:
        self.totals: dict[str, float] = dict.fromkeys(TOTALS, 0)
        self.first_refusals: dict[str, str] = {}  # what the first request of each reason was told
        self.in_flight = 0
        self.max_in_flight = 0

    def add(self, name: str, amount: float = 1) -> None:
        """Add `amount` to the total `name`."""
        self.totals[name] += amount

    def begin(self) -> None:
        """Count a request in."""
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)

    def end(self) -> None:
        """Count a request out."""
        self.in_flight -= 1


def resident_bytes() -> int:
    """Memory of this process in bytes, as the kernel counts it."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def prometheus(values: Mapping[str, float]) -> str:
    """`values` in Prometheus' text format."""
    lines = []
    for name, value in values.items():
        full = f"atropos_exp_gateway_{name}" + ("" if name in GAUGES else "_total")
        lines.append(f"# TYPE {full} {'gauge' if name in GAUGES else 'counter'}\n{full} {value}\n")
    return "".join(lines)
