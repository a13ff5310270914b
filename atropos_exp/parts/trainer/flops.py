"""The FLOPs that an update needs and the devices' peak, from which `throughput/mfu` is computed."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

# Dense bfloat16 FLOP/s from the vendors' data sheets; the first name that is contained in the device's applies.
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "4090": 165e12,
}


def peak_flops(device: torch.device) -> float:
    """Dense bfloat16 FLOP/s of one device; NaN if unknown."""
    if device.type != "cuda":
        return math.nan
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), math.nan)


class UpdateFlops:
    """FLOPs of the forward and backward passes; a multiplication and an addition are two.

    They count what an update must do: all packed tokens through the blocks, the output head on trained tokens only,
    causal attention within each sequence. They do not count recomputation, passes
    for old or reference logprobs, the optimizer, or adapters. For a mixture of experts, and for layers that are not
    attention, the result is NaN.
    """

    def __init__(self, module: nn.Module, config: Any, *, lora: bool) -> None:
        outside = ("embed_tokens.", "lm_head.", "wte.", "wpe.")
        weights = {
            name: weight
            for name, weight in module.named_parameters()
            if weight.dim() > 1 and ".lora_" not in name and not any(part in name for part in outside)
        }
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        known = all(hasattr(config, name) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
        plain = all(weight.dim() == 2 for weight in weights.values()) and kinds <= {
            "full_attention",
            "sliding_attention",
        }
        self._per_token = 2.0 * sum(weight.numel() for weight in weights.values()) if plain and known else math.nan
        if known:
            head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            self._per_trained_token = 2.0 * config.vocab_size * config.hidden_size
            self._per_pair = 4.0 * config.num_hidden_layers * config.num_attention_heads * head_size
        else:
            self._per_trained_token = self._per_pair = math.nan
        # The backward pass costs twice the forward; frozen weights need no gradient of their own.
        self._passes = 2.0 if lora else 3.0

    def __call__(self, lengths: Sequence[int], num_trained: int) -> float:
        """FLOPs of one update over sequences of these `lengths` in tokens, `num_trained` of which are trained."""
        pairs = sum(length * (length + 1) / 2 for length in lengths)
        forward: float = self._per_token * sum(lengths) + self._per_trained_token * num_trained + self._per_pair * pairs
        return self._passes * forward

    def peak_seconds(self, lengths: Sequence[int], num_trained: int, device: torch.device) -> float:
        """Seconds that the devices of all ranks would need at their peak; NaN if that is unknown."""
        seconds = self(lengths, num_trained) / (peak_flops(device) * dist.get_world_size())
        return seconds if math.isfinite(seconds) else math.nan
