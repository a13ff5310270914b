"""Which parts of a served model's parameters are the tensors of its checkpoint, so that they can be read back in place.

vLLM and SGLang store them alike: q, k, v and gate, up are stacked by rows, and vocabularies are padded at the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from atropos_exp.weights.tensors import Kind, dtype_name

if TYPE_CHECKING:
    from torch import Tensor

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# The quantisation methods of layers that compute with their parameters as they were loaded.
PLAIN_METHODS = ("UnquantizedLinearMethod", "UnquantizedEmbeddingMethod")


def has_plain_layers(model: Any) -> bool:
    """Whether no layer of the model repacks or quantises its parameters."""
    methods = {type(method).__name__ for module in model.modules() if (method := getattr(module, "quant_method", None))}
    return methods <= set(PLAIN_METHODS)


def views(
    parameters: Mapping[str, Tensor], fused: Mapping[str, Sequence[str]], kinds: Mapping[str, Kind]
) -> dict[str, Tensor]:
    """The tensors of `kinds` that `parameters` hold in their own dtype and a fitting shape, as views of the parameters.

        fused = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}  # parameter -> what is stacked in it, in order
        views(dict(model.named_parameters()), fused, {"layers.0.k_proj.weight": ("bfloat16", (64, 512))})

    A tensor that the model keeps in another form is left out.
    """
    found = {}
    for name, (dtype, shape) in kinds.items():
        tensor, start, rows = parameters.get(name), 0, None
        for whole, parts in fused.items():
            own = next((part for part in parts if f".{part}." in name), None)
            if tensor is None and own is not None:
                siblings = [kinds.get(name.replace(own, part)) for part in parts]
                if None in siblings:
                    break
                sizes = [sibling[1][0] for sibling in siblings if sibling]
                start, rows = sum(sizes[: parts.index(own)]), sum(sizes)
                tensor = parameters.get(name.replace(own, whole))
        if tensor is None or tensor.is_meta or tensor.dim() != len(shape) or not shape or tensor.shape[1:] != shape[1:]:
            continue
        if dtype_name(tensor) != dtype:  # vLLM keeps the biases of bfloat16 layers in float32 on a CPU with AMX
            continue
        if tensor.shape[0] == (rows or shape[0]) or (name in (EMBEDDING, HEAD) and tensor.shape[0] > shape[0]):
            found[name] = tensor.data[start : start + shape[0]]
    return found
