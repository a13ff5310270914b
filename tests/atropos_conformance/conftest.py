"""Puts the modules beside it within reach of the tests, and ends whatever they start."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.atropos_conformance.programs import Api, Environment, Run
from tests.atropos_conformance.trainer import Request


class Started:
    """What a module's tests have started. All of it is ended with the module."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._end: list[Callable[[], None]] = []

    def api(self) -> Api:
        api = Api(self.folder)
        self._end.append(api.close)
        return api

    def run(self, name: str, **request: Any) -> Run:
        """The same name again resumes a run."""
        run = Run(Request(folder=self.folder / name, **request))
        self._end.append(run.stop)
        return run

    def environment(self, api_url: str, **options: Any) -> Environment:
        environment = Environment(api_url, **options)
        self._end.append(environment.kill)
        return environment

    def later(self, end: Callable[[], None]) -> None:
        self._end.append(end)

    def close(self) -> None:
        while self._end:
            self._end.pop()()


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    everything = Started(tmp_path_factory.mktemp("conformance"))
    yield everything
    everything.close()
