"""LoRA matrices without their base (`engine.lora=adapter`), inside vLLM: they are loaded by its own LoRA support, and
read back from the buffers that it computes with.

Mixed into vLLM's worker together with `worker.WeightWorker`. It needs of vLLM what 0.24 to 0.30 have in common:
`model.lora_manager` with its `modules`, the wrapped layers, and their `lora_a_stacked` and `lora_b_stacked`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from atropos_exp.weights.tensors import LORA_A, LORA_B, Kind

if TYPE_CHECKING:
    from torch import Tensor

ADAPTER = 1  # the number that vLLM knows the adapter by


class AdapterWorker:
    """The part of `worker.WeightWorker` that concerns LoRA. Its names start with `atropos_` too."""

    device: Any  # vLLM's

    def atropos_model(self) -> Any:
        raise NotImplementedError

    def atropos_unserved(self, names: Iterable[str]) -> list[str]:
        """Modules with these matrices that vLLM has not wrapped, so it would silently ignore their LoRA."""
        wanted = {name.removesuffix(LORA_A).removesuffix(LORA_B) for name in names}
        served = {part for name in self.atropos_wrapped() for part in self.atropos_parts(name)}
        return sorted(wanted - served)

    def atropos_unwrap(self, bare: bool) -> None:
        """Replace every wrapped layer by the layer inside, under the name that vLLM loads its weights by; or, if not
        `bare`, wrap them again."""
        model = self.atropos_model()
        for name, layer in self.atropos_wrapped().items():
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer.base_layer if bare else layer)

    def atropos_place_adapter(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the adapter by these matrices, all of them, on this device and no longer changed. B is already
        multiplied by alpha / rank, so vLLM gets a scaling of 1 and its buffers have the bits that arrived."""
        from vllm.lora.lora_model import LoRAModel
        from vllm.lora.peft_helper import PEFTHelper

        manager = self.atropos_model().lora_manager
        rank = next(tensor.shape[0] for name, tensor in tensors.items() if name.endswith(LORA_A))
        config = PEFTHelper(r=rank, lora_alpha=rank, target_modules=[])
        adapter = LoRAModel.from_lora_tensors(ADAPTER, dict(tensors), config, device=str(self.device))
        manager.remove_adapter(ADAPTER)
        manager.add_adapter(adapter)
        manager.activate_adapter(ADAPTER)

    def atropos_resident_adapter(self, kinds: Mapping[str, Kind]) -> dict[str, Tensor]:
        """The matrices of `kinds` as vLLM's kernels read them: the part of each buffer that is filled, as a view."""
        wrapped = self.atropos_wrapped()
        if not wrapped or ADAPTER not in (slots := self.atropos_model().lora_manager.lora_index_to_id):
            return {}
        slot = slots.index(ADAPTER)
        found = {}
        for name, layer in wrapped.items():
            parts = self.atropos_parts(name)
            if len(parts) == len(layer.lora_a_stacked):
                for part, low, high in zip(parts, layer.lora_a_stacked, layer.lora_b_stacked, strict=True):
                    for matrix, buffer in ((part + LORA_A, low), (part + LORA_B, high)):
                        if matrix in kinds:
                            rows, columns = kinds[matrix][1]
                            found[matrix] = buffer[slot, 0, :rows, :columns]
        return found

    def atropos_wrapped(self) -> dict[str, Any]:
        """The layers that vLLM has wrapped for LoRA, by their names in the model."""
        manager = getattr(self.atropos_model(), "lora_manager", None)
        return {} if manager is None else manager.modules

    def atropos_parts(self, name: str) -> list[str]:
        """The modules that are stacked in a wrapped layer, in order: q, k, v or gate, up; or the layer alone."""
        parts: list[str] = self.atropos_model().lora_manager.packed_modules.get(name, [name])
        return parts
