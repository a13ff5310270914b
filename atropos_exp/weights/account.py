"""The server's account of a weight update: what must arrive, what has arrived, and whether it is one policy."""

import contextlib
import time
from collections.abc import Iterator, Mapping

from atropos_exp.errors import Refused
from atropos_exp.weights.tensors import Kind, some


class UpdateAccount:
    """Keeps track of one update after another and refuses, with `Refused`, what does not fit. It holds no tensor.

        account.begin(7)
        for name, tensor in tensors:
            account.admit(name, ("bfloat16", tuple(tensor.shape)))
            load(name, tensor)
            account.received(name)
        account.check_complete()
        account.finish()  # version 7 is served

    One thread uses it. `problem` says why the weights are not one consistent policy; then nothing may be sampled.
    """

    def __init__(
        self,
        base: Mapping[str, Kind],
        aliases: Mapping[str, str],
        *,
        adapter: Mapping[str, Kind] | None = None,
        problem: str | None = None,
    ) -> None:
        """`base`, `adapter`: dtype and shape of each tensor that an update brings; with an adapter, the base comes only
        when it is not held already. `aliases`: tied name -> the expected name that owns the tensor. `problem`: why
        nothing may be sampled before the first update."""
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
        """Whether an update is in progress."""
        return self._next_version is not None

    @property
    def expected(self) -> dict[str, Kind]:
        """Every tensor that the next update must bring, or the one in progress."""
        return self.adapter if self._holds_base and self.adapter else self.kinds

    def begin(self, version: int) -> None:
        """Start an update, whatever became of the last one. Refuses a version older than the one served."""
        self._holds_base = self._holds_base and self.problem is None
        if version < self.version:
            raise Refused(409, f"update to version {version} refused: version {self.version} is already served")
        self._next_version = version
        self._received = set()
        self.seconds = {}

    @contextlib.contextmanager
    def spent(self, part: str) -> Iterator[None]:
        """Add the seconds inside the block to those of a part of the update."""
        started = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - started

    def mark_incomplete(self) -> None:
        """Mark the weights as incomplete at once: for an engine that cannot compute during an update."""
        self.problem = self._interrupted()

    def fall_asleep(self) -> None:
        """Note that the memory of the weights was released, until an update brings new ones."""
        assert self._next_version is None, "not during an update"
        self._holds_base = False
        self.problem = f"asleep since version {self.version}: the trainer has the memory; the next update wakes it"

    def admit(self, name: str, kind: Kind) -> None:
        """Check one tensor that is about to be loaded: expected, of the right dtype and shape, and not sent before."""
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
        """Note that a tensor has been loaded. From the first one on the weights are incomplete, until `finish`."""
        if name not in self.aliases:
            self._received.add(name)
            self._holds_base = self._holds_base and name in self.adapter
            self.problem = self._interrupted()

    def check_complete(self) -> None:
        """Abort the update and refuse if a tensor is missing."""
        if self._next_version is None:
            raise Refused(409, "finish without an update in progress")
        missing = [name for name in self.expected if name not in self._received]
        if missing:
            reason = f"update to version {self._next_version} misses {some(missing)} of {len(self.expected)} tensors"
            self.abort()
            raise Refused(400, reason)

    def finish(self) -> None:
        """Serve the new version. `check_complete` comes first."""
        assert self._next_version is not None, "check_complete comes first"
        self.version, self._next_version = self._next_version, None
        self._holds_base = True
        self.problem = None

    def abort(self) -> None:
        """Abandon the update. Whatever it changed, nothing may be sampled until a complete one has arrived."""
        if self._next_version is not None:
            self.problem = self._interrupted()
            self._next_version = None
            self._holds_base = False

    def _interrupted(self) -> str:
        return (
            f"weights incomplete: update to version {self._next_version} interrupted after {len(self._received)} "
            f"of {len(self.expected)} tensors"
        )
