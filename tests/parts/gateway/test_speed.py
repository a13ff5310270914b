"""A short run of `benchmarks/gateway.py`: ratios and memory, no absolute times."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT

BENCHMARK = ROOT / "benchmarks" / "gateway.py"


@pytest.mark.slow
def test_throughput_and_memory() -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), "--requests", "2000", "--json"], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["requests"] == 2000
    assert found["throughput_ratio"] > 0.2
    assert found["added_latency_ms"] < found["engine_latency_ms"]
    assert found["ledger_entries"] == 500 and found["ledger_evicted"] >= 2000  # it was full all the time
    assert found["rss_after_mib"] - found["rss_before_mib"] < 8
