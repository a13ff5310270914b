"""One weight update of all servers of an engine: every step ends on all of them before the next one begins."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from atropos_exp.errors import EngineError, EngineLost
from atropos_exp.parts.engine.client import EngineClient
from atropos_exp.weights.transport import Transport

if TYPE_CHECKING:
    from torch import Tensor

Item = TypeVar("Item")
Value = TypeVar("Value")
ABORT_SECONDS = 5.0  # for a server to abandon an update


def together(items: Sequence[Item], work: Callable[[Item], Value]) -> list[Value]:
    """The results of `work` for all items, computed at the same time, in order. When all have ended, one of the errors
    is raised: EngineLost before any other, which may be its consequence.

        versions = together(clients, lambda client: client.version())
    """
    if len(items) == 1:
        return [work(items[0])]
    with ThreadPoolExecutor(len(items), thread_name_prefix="engine") as pool:
        futures = [pool.submit(work, item) for item in items]
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        raise next((error for error in errors if isinstance(error, EngineLost)), errors[0])
    return [future.result() for future in futures]


@contextlib.contextmanager
def update(clients: Sequence[EngineClient], transport: Transport, version: int) -> Iterator[Receiver]:
    """As `Engine.updating`: pause all servers, begin, hand out the receiver, commit, resume. An exception in the block
    abandons the update on all servers, which then refuse to sample."""

    def ask(path: str, what: str, message: Mapping[str, Any] | None = None) -> None:
        together(clients, lambda client: client.exchange(path, dict(message or {}), what=what))

    def abort(client: EngineClient) -> None:
        client.exchange("/weights/abort", {}, what="the update to be given up", seconds=ABORT_SECONDS)
        client.resume()

    facts = together(clients, lambda client: client.info())
    expected = [{name: (kind, tuple(shape)) for name, kind, shape in fact["expected"]} for fact in facts]
    kinds = max(expected, key=len)  # a restarted server needs the base as well, and then all get it
    if any(not other.items() <= kinds.items() for other in expected):
        raise EngineError("the engine's servers expect different tensors")
    try:
        together(clients, lambda client: client.pause())
        ask("/weights/begin", f"the update to version {version} to begin", {"version": version})
        yield Receiver(clients, transport, kinds, version, facts[0]["hub_names"] is True)
        ask("/weights/finish", f"version {version} to be accepted")
    except BaseException as error:
        try:
            together(clients, abort)
        except EngineError as also:
            error.add_note(f"while giving the update up: {also}")
        raise
    finally:
        transport.clear()
    together(clients, lambda client: client.resume())


@dataclass(frozen=True, eq=False)
class Receiver:
    """A `WeightReceiver` for one update of all servers."""

    clients: Sequence[EngineClient]
    transport: Transport
    kinds: Mapping[str, tuple[str, tuple[int, ...]]]
    version: int
    hub_names: bool

    def expected(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        return self.kinds

    def receive(self, bucket: Sequence[tuple[str, Tensor]]) -> None:
        """Send one bucket to all servers. Returns when they have loaded it."""
        names = f"{bucket[0][0]} .. {bucket[-1][0]}" if bucket else "nothing"
        what = f"version {self.version}: {names} to be loaded"
        with self.transport.sending(bucket) as message:
            together(self.clients, lambda client: client.exchange("/weights/bucket", message, what=what))

    def digests(self) -> Mapping[str, str]:
        """The digests on which all servers agree; for a tensor on which they differ, a text that equals no digest."""
        first, *others = together(self.clients, lambda client: client.digests())
        held = {}
        for name, value in first.items():
            strange = [number for number, other in enumerate(others, 1) if other.get(name) != value]
            held[name] = f"server {strange[0]} differs" if strange else value
        return held
