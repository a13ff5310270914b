"""Which parameters of a served model are read back as tensors of the checkpoint."""

from __future__ import annotations

import torch

from atropos_exp.weights.resident import EMBEDDING, views
from atropos_exp.weights.tensors import Kind

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}
LAYER = "model.layers.0.self_attn"


def test_parts_of_fused_parameters_and_of_padded_vocabularies() -> None:
    parameters = {
        f"{LAYER}.qkv_proj.weight": torch.arange(24.0).reshape(8, 3),
        EMBEDDING: torch.zeros(16, 3),
        "model.norm.weight": torch.ones(3),
    }
    kinds: dict[str, Kind] = {
        f"{LAYER}.q_proj.weight": ("float32", (4, 3)),
        f"{LAYER}.k_proj.weight": ("float32", (2, 3)),
        f"{LAYER}.v_proj.weight": ("float32", (2, 3)),
        EMBEDDING: ("float32", (10, 3)),
        "model.norm.weight": ("float32", (3,)),
    }
    found = views(parameters, FUSED, kinds)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {
        name: shape for name, (_, shape) in kinds.items()
    }
    assert found[f"{LAYER}.v_proj.weight"].flatten().tolist() == [18, 19, 20, 21, 22, 23]
    parameters[EMBEDDING][0] = 7.0
    assert found[EMBEDDING][0].tolist() == [7, 7, 7]  # no copy: what the model computes with


def test_what_a_kernel_keeps_in_another_form_is_not_read_back() -> None:
    """As vLLM does on a CPU with AMX, whose biases of bfloat16 layers are in float32."""
    parameters = {f"{LAYER}.qkv_proj.bias": torch.zeros(8), f"{LAYER}.o_proj.weight": torch.zeros(6, 2)}
    kinds: dict[str, Kind] = {
        f"{LAYER}.q_proj.bias": ("bfloat16", (4,)),
        f"{LAYER}.k_proj.bias": ("bfloat16", (2,)),
        f"{LAYER}.v_proj.bias": ("bfloat16", (2,)),
        f"{LAYER}.o_proj.weight": ("float32", (3, 4)),
    }
    assert views(parameters, FUSED, kinds) == {}
    as_they_came = {name: ("float32", shape) for name, (_, shape) in kinds.items()}
    assert set(views(parameters, FUSED, as_they_came)) == set(kinds) - {f"{LAYER}.o_proj.weight"}
