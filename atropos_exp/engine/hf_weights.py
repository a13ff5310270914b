"""The server's side of a weight update: what must arrive, what has, and what the model holds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from atropos_exp.wire_tensors import TENSOR_DTYPES, digest, dtype_name

if TYPE_CHECKING:
    from torch import Tensor


class Refused(Exception):
    """A request that this server will not do. The text goes to the client."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status  # of HTTP: 400 wrong request, 409 not in this state, 503 not in time


class WeightStore:
    """The model's parameters, their version, and whether they belong together. One thread uses it."""

    def __init__(self, model: Any) -> None:
        self.version = 0  # of the last complete update; 0: as loaded from the folder
        self.problem: str | None = None  # why the weights are not one consistent policy
        self._parameters: dict[str, Tensor] = {}
        self._aliases: dict[str, str] = {}  # tied name -> the name that owns the tensor
        names: dict[int, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if id(parameter) in names:
                self._aliases[name] = names[id(parameter)]
                continue
            assert dtype_name(parameter) in TENSOR_DTYPES, f"{name} is {parameter.dtype}"
            names[id(parameter)] = name
            self._parameters[name] = parameter
        self._next_version: int | None = None  # of the update in progress
        self._received: set[str] = set()
        self._alias_digests: dict[str, str] = {}

    def expected(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """name -> (dtype, shape) of every tensor an update must bring. A tied tensor has one name here; sending
        it under its other name too is allowed, and then compared."""
        return {name: (dtype_name(tensor), tuple(tensor.shape)) for name, tensor in self._parameters.items()}

    def begin(self, version: int) -> None:
        """Start over with an empty account, whatever came before."""
        if version < self.version:
            raise Refused(409, f"update to version {version} refused: version {self.version} is already served")
        self._next_version = version
        self._received = set()
        self._alias_digests = {}

    def load(self, name: str, tensor: Tensor) -> None:
        """Copy one tensor into the model. From the first one on the weights are incomplete until `finish`."""
        if self._next_version is None:
            raise Refused(409, f"{name} sent without an update in progress")
        if name in self._received:
            raise Refused(400, f"{name} sent twice in the update to version {self._next_version}")
        own_name = self._aliases.get(name, name)
        parameter = self._parameters.get(own_name)
        if parameter is None:
            raise Refused(400, f"{name} is not a parameter of the served model")
        got, want = (dtype_name(tensor), tuple(tensor.shape)), (dtype_name(parameter), tuple(parameter.shape))
        if got != want:
            raise Refused(400, f"{name}: got {got[0]} {list(got[1])}, expected {want[0]} {list(want[1])}")
        if name in self._aliases:
            self._alias_digests[name] = digest(tensor)
            return
        self._received.add(name)
        self.problem = self._interrupted()
        parameter.data.copy_(tensor)

    def finish(self) -> None:
        """Accept the update if every tensor has arrived; else the weights stay incomplete."""
        if self._next_version is None:
            raise Refused(409, "finish without an update in progress")
        missing = [name for name in self._parameters if name not in self._received]
        if missing:
            reason = f"update to version {self._next_version} misses {_some(missing)}"
            self.abort()
            raise Refused(400, f"{reason} of {len(self._parameters)} tensors")
        for alias, sent in self._alias_digests.items():
            if sent != digest(self._parameters[self._aliases[alias]]):
                reason = f"{alias} is tied to {self._aliases[alias]}, but the two were sent with different values"
                self.abort()
                raise Refused(400, reason)
        self.version, self._next_version = self._next_version, None
        self.problem = None

    def abort(self) -> None:
        """Give the update up. Whatever it changed already, nothing is sampled until a complete one has arrived."""
        if self._next_version is not None:
            self.problem = self._interrupted()
            self._next_version = None

    def digests(self) -> dict[str, str]:
        """xxh3-128 of each parameter as the model holds it now."""
        return {name: digest(parameter) for name, parameter in self._parameters.items()}

    def _interrupted(self) -> str:
        return (
            f"weights incomplete: update to version {self._next_version} interrupted after {len(self._received)} "
            f"of {len(self._parameters)} tensors"
        )


def _some(names: Iterable[str], limit: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
