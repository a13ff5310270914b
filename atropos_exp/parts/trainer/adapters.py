"""How LoRA's matrices change the weights that they adapt: of linear layers, and of stacks of experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """What a pair of matrices A [r, in] and B [out, r] does to one weight. For a stack of E experts they are
    [E r, in] and [out, r E]."""

    weight: str  # its name in transformers' model
    scaling: float
    num_experts: int  # 1: the weight is not a stack
    transposed: bool  # the weight (of each expert) is [in, out]

    def delta(self, low: Tensor, high: Tensor) -> Tensor:
        """What the weight is increased by. `low`, `high`: A and B, float32."""
        import torch

        if self.num_experts == 1:
            change = self.scaling * (high @ low)
            return change.T if self.transposed else change
        low = low.reshape(self.num_experts, -1, low.shape[-1])  # [E, r, in]
        high = high.reshape(high.shape[0], -1, self.num_experts)  # [out, r, E]: as PEFT has it
        axes = "ore,eri->eio" if self.transposed else "ore,eri->eoi"
        return self.scaling * torch.einsum(axes, high, low)


def plain_name(name: str) -> str:
    """The name of a parameter or module in transformers' model, without what PEFT adds to it."""
    parts = name.removeprefix("base_model.model.").split(".")
    return ".".join(part for part in parts if part != "base_layer")


def adaptations(module: nn.Module) -> dict[str, Adaptation]:
    """Of every layer with LoRA matrices, by its name in the module: what they do. Empty for a module without LoRA."""
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper

    found = {}
    for name, layer in module.named_modules():
        if isinstance(layer, LoraLayer):
            (adapter,) = layer.scaling  # the trainer makes one
            wrapper: Any = layer if isinstance(layer, ParamWrapper) else None
            found[name] = Adaptation(
                weight=f"{plain_name(name)}.{wrapper.parameter_name if wrapper else 'weight'}",
                scaling=layer.scaling[adapter],
                num_experts=wrapper.num_experts if wrapper else 1,
                transposed=not wrapper._did_swap_in_out_features
                if wrapper and wrapper.num_experts > 1
                else bool(layer.fan_in_fan_out),
            )
    return found
