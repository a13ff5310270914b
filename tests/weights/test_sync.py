"""A sync moves every bit, and says so."""

from __future__ import annotations

from tests.helpers.sync_contract import SyncContract


class TestSync(SyncContract):
    tolerance = 1e-5
