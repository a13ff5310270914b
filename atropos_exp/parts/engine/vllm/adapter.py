"""LoRA matrices that come by themselves (`engine.lora=adapter`), inside vLLM: they are given to its own LoRA support,
and read back from the buffers that it computes with.

Mixed into vLLM's worker together with `worker.WeightWorker`. It needs of vLLM what 0.24 to 0.30 have in common:
`model.lora_manager` with its `modules`, the wrapped layers, and their `lora_a_stacked` and `lora_b_stacked`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from atropos_exp.weights.tensors import LORA_A, LORA_B, Kind

if TYPE_CHECKING:
    from torch import Tensor

ADAPTER = 1  # vLLM's number of it


class AdapterWorker:
    """Its names start with `atropos_`, as those of `WeightWorker`."""

    device: Any  # vLLM's

    def atropos_model(self) -> Any:
        raise NotImplementedError

    def atropos_unserved(self, names: Iterable[str]) -> list[str]:
        """Modules with these matrices that vLLM has not wrapped: it would pass over their LoRA without a word."""
        wanted = {name.removesuffix(LORA_A).removesuffix(LORA_B) for name in names}
        served = {part for name in self.atropos_wrapped() for part in self.atropos_parts(name)}
        return sorted(wanted - served)

    def atropos_unwrap(self, bare: bool) -> None:
        """`bare`: layers as vLLM loads their weights, under the names that it knows them by. Else wrapped again."""
        model = self.atropos_model()
        for name, layer in self.atropos_wrapped().items():
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer.base_layer if bare else layer)

    def atropos_place_adapter(self, tensors: Mapping[str, Tensor]) -> None:
        """All matrices of the adapter, on this device and not to be changed any more, replace the last ones. B comes
        scaled, so vLLM is told a scaling of 1 and its buffers have the bits that came."""
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
        """Those of `kinds` as vLLM's kernels read them: the part of each buffer that a matrix fills, as a view."""
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
        """Layers that vLLM has wrapped for LoRA, by the names that they have in the model."""
        manager = getattr(self.atropos_model(), "lora_manager", None)
        return {} if manager is None else manager.modules

    def atropos_parts(self, name: str) -> list[str]:
        """What a wrapped layer is made of, in order: vLLM stacks q, k, v and gate, up."""
        parts: list[str] = self.atropos_model().lora_manager.packed_modules.get(name, [name])
        return parts
