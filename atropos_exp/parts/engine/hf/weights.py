"""The model's parameters in engine `hf`: every tensor of an update is copied to its place, and can be read back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from atropos_exp.errors import Refused
from atropos_exp.weights.account import UpdateAccount
from atropos_exp.weights.digest import digest
from atropos_exp.weights.tensors import TENSOR_DTYPES, dtype_name

if TYPE_CHECKING:
    from torch import Tensor


class WeightStore:
    """The model's parameters and persistent buffers. `account`: their version, and whether they are one consistent
    policy. One thread uses it.

        store = WeightStore(model)
        store.begin(7)
        for name, tensor in tensors:
            store.load(name, tensor)
        store.finish()  # version 7 is served

    What does not fit raises Refused. A tied tensor is expected under one name; it may be sent under its other name too,
    and is then compared.
    """

    def __init__(self, model: Any, *, problem: str | None = None) -> None:
        self._parameters: dict[str, Tensor] = {}
        aliases: dict[str, str] = {}  # tied name -> the name that owns the tensor
        names: dict[int, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if id(parameter) in names:
                aliases[name] = names[id(parameter)]
                continue
            assert dtype_name(parameter) in TENSOR_DTYPES, f"{name} is {parameter.dtype}"
            names[id(parameter)] = name
            self._parameters[name] = parameter
        every = model.state_dict(keep_vars=True)  # buffers too, which a checkpoint holds
        self._parameters |= {name: value for name, value in every.items() if name not in {*self._parameters, *aliases}}
        kinds = {name: (dtype_name(tensor), tuple(tensor.shape)) for name, tensor in self._parameters.items()}
        self.account = UpdateAccount(kinds, aliases, problem=problem)
        self._alias_digests: dict[str, str] = {}

    def begin(self, version: int) -> None:
        """Start an update, whatever became of the last one."""
        self.account.begin(version)
        self._alias_digests = {}

    def load(self, name: str, tensor: Tensor) -> None:
        """Copy one tensor into the model. From the first one on the weights are incomplete until `finish`."""
        self.account.admit(name, (dtype_name(tensor), tuple(tensor.shape)))
        self.account.received(name)
        if name in self.account.aliases:
            self._alias_digests[name] = digest(tensor)
        else:
            self._parameters[name].data.copy_(tensor)

    def finish(self) -> None:
        """Accept the update if every tensor has arrived; otherwise the weights stay incomplete."""
        self.account.check_complete()
        for alias, sent in self._alias_digests.items():
            owner = self.account.aliases[alias]
            if sent != digest(self._parameters[owner].cpu()):
                self.abort()
                raise Refused(400, f"{alias} is tied to {owner}, but the two were sent with different values")
        self.account.finish()

    def abort(self) -> None:
        """Abandon the update. If it changed a weight, nothing may be sampled until a complete one has arrived."""
        self.account.abort()

    def digests(self, *, on_device: bool = False) -> dict[str, str]:
        """The digest of each parameter as the model holds it now, computed `on_device` or from a copy on the host."""
        return {
            name: digest(parameter if on_device else parameter.cpu()) for name, parameter in self._parameters.items()
        }
