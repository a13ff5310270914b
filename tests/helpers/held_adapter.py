"""A trainer that holds a plain base and LoRA matrices, which PEFT computes with and a test changes."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from atropos_exp.parts.trainer.hub_names import HubNames
from atropos_exp.types import SamplingParams
from tests.helpers.publishing import HeldModel
from tests.helpers.random_models import completion_logprobs, random_prompts

# Not a rank that vLLM has room for (it takes the next, 8, and pads), and no k_proj, which it stacks with q and v.
TARGETS = ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CHOICE = SimpleNamespace(rank=6, alpha=9, target_modules=TARGETS)
SCALE = 1.5


class HeldAdapter(HeldModel):
    """`model` is PEFT's around the plain one."""

    def __init__(self, base: Any, *, seed: int = 0) -> None:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=CHOICE.rank, lora_alpha=CHOICE.alpha, target_modules=list(TARGETS))
        super().__init__(get_peft_model(base, config).eval())
        torch.manual_seed(seed)
        with torch.no_grad():
            for _, matrix in self.matrices():
                matrix.normal_(std=0.3)

    def matrices(self) -> list[tuple[str, torch.Tensor]]:
        """PEFT's names, without those of its wrappers."""
        return [(bare(name), tensor) for name, tensor in self.model.named_parameters() if ".lora_" in name]

    def base(self) -> dict[str, torch.Tensor]:
        found = {bare(name): tensor for name, tensor in self.model.named_parameters() if ".lora_" not in name}
        return {name: tensor.detach() for name, tensor in found.items()}

    def adapter(self, *, with_base: bool) -> Iterator[tuple[str, torch.Tensor]]:
        if with_base:
            yield from self.base().items()
        for name, tensor in self.matrices():
            yield name, tensor * SCALE if ".lora_B." in name else tensor

    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The base with W + SCALE * B @ A where there are matrices."""
        matrices = dict(self.matrices())
        for name, tensor in self.base().items():
            module = name.removesuffix(".weight")
            if f"{module}.lora_A.weight" in matrices:
                tensor = tensor + SCALE * matrices[f"{module}.lora_B.weight"] @ matrices[f"{module}.lora_A.weight"]
            yield name, tensor.detach()

    def on_hub(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        return HubNames(self.model.get_base_model(), self.base()).convert(tensors)

    def disturb(self, scale: float = 0.05) -> None:
        """Every matrix changes, and nothing else."""
        with torch.no_grad():
            for _, matrix in self.matrices():
                matrix += scale * torch.randn_like(matrix)


def largest_gap(trainer: HeldAdapter, engine: Any, params: SamplingParams) -> float:
    """Between the engine's logprobs of what it samples and PEFT's, in nats."""
    gaps = []
    prompts = random_prompts([5, 140, 9], seed=2)
    for prompt, group in zip(prompts, engine.generate(prompts, params, num_samples=2), strict=True):
        for sample in group:
            expected = completion_logprobs(trainer.model, prompt, sample.token_ids, params.temperature or 1.0)
            gaps.append(np.abs(sample.logprobs - expected).max())
    return float(max(gaps))


def bare(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".default.", ".")
