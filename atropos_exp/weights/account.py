"""The server's account of a weight update: what must arrive, what has, and whether the weights belong together."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping

from atropos_exp.errors import Refused
from atropos_exp.weights.tensors import Kind, some


class UpdateAccount:
    """Says no to what does not fit. It holds no tensor. One thread uses it."""

    def __init__(
        self,
        base: Mapping[str, Kind],
        aliases: Mapping[str, str],
        *,
        adapter: Mapping[str, Kind] | None = None,
        problem: str | None = None,
    ) -> None:
        """`base`, `adapter`: what an update brings; with an adapter, the base only where it is not held already.
        `aliases`: tied name -> the expected name that owns the tensor. `problem`: why not to sample yet."""
        self.adapter = dict(adapter or {})
        self.kinds = {**base, **self.adapter}  # of every tensor that may come
        self.aliases = dict(aliases)
        self._holds_base = False  # it came in a complete update, and nothing has touched it since
        self.version = 0  # of the last complete update; 0: as loaded from the folder
        self.problem = problem  # why the weights are not one consistent policy
        self._next_version: int | None = None  # of the update in progress
        self._received: set[str] = set()
        self.seconds: dict[str, float] = {}  # of the last update, by part; see `spent`

    @property
    def is_open(self) -> bool:
        """An update is in progress."""
        return self._next_version is not None

    @property
    def expected(self) -> dict[str, Kind]:
        """Every tensor that the next update must bring, or the one in progress."""
        return self.adapter if self._holds_base and self.adapter else self.kinds

    def begin(self, version: int) -> None:
        """Start over with an empty account, whatever came before."""
        self._holds_base = self._holds_base and self.problem is None
        if version < self.version:
            raise Refused(409, f"update to version {version} refused: version {self.version} is already served")
        self._next_version = version
        self._received = set()
        self.seconds = {}

    @contextlib.contextmanager
    def spent(self, part: str) -> Iterator[None]:
        """Book the seconds inside as those of a part of the update."""
        started = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - started

    def mark_incomplete(self) -> None:
        """For a backend that cannot compute from the first moment of an update on."""
        self.problem = self._interrupted()

    def fall_asleep(self) -> None:
        """The weights are gone, until an update brings new ones."""
        assert self._next_version is None, "not during an update"
        self._holds_base = False
        self.problem = f"asleep since version {self.version}: the trainer has the memory; the next update wakes it"

    def admit(self, name: str, kind: Kind) -> None:
        """One tensor that is about to be loaded: it is wanted, and for the first time."""
        if self._next_version is None:
            raise Refused(409, f"{name} sent without an update in progress")
        if name in self._received:
            raise Refused(400, f"{name} sent twice in the update to version {self._next_version}")
        want = self.kinds.get(self.aliases.get(name, name))
        if want is None:
            raise Refused(400, f"{name} is not a parameter of the served model")
        if kind != want:
            raise Refused(400, f"{name}: got {kind[0]} {list(kind[1])}, expected {want[0]} {list(want[1])}")

    def received(self, name: str) -> None:
        """It is loaded now: from the first one on the weights are incomplete until `finish`."""
        if name not in self.aliases:
            self._received.add(name)
            self._holds_base = self._holds_base and name in self.adapter
            self.problem = self._interrupted()

    def check_complete(self) -> None:
        """Refuses, and gives the update up, if a tensor is missing."""
        if self._next_version is None:
            raise Refused(409, "finish without an update in progress")
        missing = [name for name in self.expected if name not in self._received]
        if missing:
            reason = f"update to version {self._next_version} misses {some(missing)} of {len(self.expected)} tensors"
            self.abort()
            raise Refused(400, reason)

    def finish(self) -> None:
        assert self._next_version is not None, "check_complete comes first"
        self.version, self._next_version = self._next_version, None
        self._holds_base = True
        self.problem = None

    def abort(self) -> None:
        """Give the update up. Whatever it changed already, nothing is sampled until a complete one has arrived."""
        if self._next_version is not None:
            self.problem = self._interrupted()
            self._next_version = None
            self._holds_base = False

    def _interrupted(self) -> str:
        return (
            f"weights incomplete: update to version {self._next_version} interrupted after {len(self._received)} "
            f"of {len(self.expected)} tensors"
        )
