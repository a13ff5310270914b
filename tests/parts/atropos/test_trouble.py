"""The first error of a log, not the last words of what gave up because of it."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from atropos_exp.parts.atropos.trouble import first_error

RETRIED = """
import logging, tenacity
logging.basicConfig(format="%(asctime)s - %(levelname)s - %(message)s")
logging.warning("nothing yet")

@tenacity.retry(stop=tenacity.stop_after_attempt(2))
def fail():
    {}["tokens of the row"]

fail()
"""


def test_the_cause_is_named_and_not_the_retries(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", RETRIED], capture_output=True, text=True, timeout=60)
    (tmp_path / "log").write_text(done.stderr)
    assert done.stderr.strip().splitlines()[-1].startswith("tenacity.RetryError")
    assert first_error(tmp_path / "log") == "KeyError: 'tokens of the row'"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("all is well\nno ERRORS here\n", None),
        ("2026 - WARNING - a\n2026 - ERROR - b went wrong\n2026 - ERROR - c\n", "2026 - ERROR - b went wrong"),
        ("ERROR RetryError[<Future>]\nERROR y\n", "ERROR y"),
        ("ERROR RetryError[<Future>]\n", "ERROR RetryError[<Future>]"),
        ("ERROR x\nTraceback (most recent call last):\n  File\n    line\nOSError: y\n", "OSError: y"),
        ("  Traceback (most recent call last):\n    File\n  OSError: y\n", "OSError: y"),
        ("Traceback (most recent call last):\n  torn", None),
    ],
)
def test_what_counts_as_the_first_error(text: str, expected: str | None, tmp_path: Path) -> None:
    (tmp_path / "log").write_text(text)
    assert first_error(tmp_path / "log") == expected
    assert first_error(tmp_path / "nowhere") is None


def test_a_long_error_is_cut(tmp_path: Path) -> None:
    (tmp_path / "log").write_text(f"{logging.getLevelName(logging.ERROR)} " + "x" * 5000)
    assert len(first_error(tmp_path / "log") or "") == 300
