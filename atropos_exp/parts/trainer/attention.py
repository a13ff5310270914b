"""Causal attention over packed sequences, registered with transformers as `atropos_packed`.

Sequences lie end to end in one row; each attends to itself only. On CUDA in half precision this is torch's own
variable-length kernel; elsewhere sequences of similar length are padded to [N, T] for one causal attention
each. No mask of the size S x S is ever built. With Ulysses sequence parallelism (DeepSpeed, arXiv 2309.14509)
the ranks trade their part of the sequence for their part of the heads before, and back after.
"""

import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from atropos_exp.errors import UserError
from atropos_exp.parts.trainer.packing import Packing

NAME = "atropos_packed"
# What verl itself makes safe for sequence parallelism; any other attention would silently see its own shard only.
ULYSSES_SAFE = (NAME, "flash_attention_2", "flash_attention_3")


def register() -> str:
    """Register `packed_attention` with transformers and return its name for `attn_implementation`."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _no_mask)
    return NAME


def _no_mask(*_: Any, **__: Any) -> None:
    """No mask: the packing holds the same information."""


def packed_attention(
    module: Any,
    query: Tensor,  # [1, heads, S, D]
    key: Tensor,  # [1, key-value heads, S, D]
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention output [1, S, heads, D]. transformers calls it for every layer; `packing` is passed through the model.

    Raises UserError for features of a model that it does not support.
    """
    if packing is None:
        raise RuntimeError(f"{NAME} attention was called outside of the trainer, or the model drops keyword arguments")
    unsupported = [name for name in ("softcap", "s_aux") if options.get(name) is not None]
    if dropout:
        unsupported.append("attention_dropout")
    if unsupported:
        raise UserError(
            f"model.attn_implementation={NAME} does not support {', '.join(unsupported)}, which this model uses. "
            "Choose model.attn_implementation=eager."
        )
    if packing.sp_size > 1:
        query, key, value = _to_full_sequence(query, key, value, packing.sp_size)
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        output = _variable_length(query, key, value, packing, scaling, sliding_window)
    else:
        output = _padded(query, key, value, packing, scaling, sliding_window)
    output = output.unsqueeze(0)
    if packing.sp_size > 1:
        from verl.utils.ulysses import gather_heads_scatter_seq

        output = gather_heads_scatter_seq(output, head_dim=2, seq_dim=1)
    return output, None


def _to_full_sequence(query: Tensor, key: Tensor, value: Tensor, sp_size: int) -> tuple[Tensor, ...]:
    """Trade all heads of this rank's part of the sequence for a part of the heads of the whole sequence."""
    from verl.utils.ulysses import gather_seq_scatter_heads

    if (repeats := sp_size // key.size(1)) > 1:  # fewer key-value heads than ranks
        key, value = (states.repeat_interleave(repeats, dim=1) for states in (key, value))
    return tuple(gather_seq_scatter_heads(states, seq_dim=2, head_dim=1) for states in (query, key, value))


@cache
def _grouped_query_option() -> dict[str, bool]:
    """The argument for grouped queries: torch 2.11's kernel needs none, 2.13's does."""
    from torch.nn.attention.varlen import varlen_attn

    return {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def _variable_length(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float | None, sliding_window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    starts, longest = packing.starts, packing.max_length
    window = (sliding_window - 1 if sliding_window else -1, 0)
    attend: Any = varlen_attn  # its signature depends on torch's version
    output: Tensor = attend(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        starts,
        starts,
        longest,
        longest,
        scale=scaling,
        window_size=window,
        **_grouped_query_option(),
    )
    return output


def _padded(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float | None, sliding_window: int | None
) -> Tensor:
    """Attention output [S, heads, D], by one dense causal attention per length bucket."""
    outputs = []
    for num_rows, length, source in packing.buckets:
        rows = [
            (states if packing.uniform else states.index_select(0, source))
            .view(num_rows, length, *states.shape[1:])
            .transpose(1, 2)
            for states in (query, key, value)
        ]
        mask = None
        if sliding_window and sliding_window < length:
            steps = torch.arange(length, device=query.device)
            distance = steps[:, None] - steps
            mask = (distance >= 0) & (distance < sliding_window)
        grouped = query.size(1) != key.size(1)
        if grouped and query.is_cuda:
            # float32: with grouped queries CUDA has only the kernel that builds all T x T scores
            repeats, grouped = query.size(1) // key.size(1), False
            rows[1:] = [states.repeat_interleave(repeats, dim=1) for states in rows[1:]]
        attended = scaled_dot_product_attention(
            rows[0],
            rows[1],
            rows[2],
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=grouped,
        )
        outputs.append(attended.transpose(1, 2).reshape(num_rows * length, *query.shape[1:]))
    if packing.uniform:
        return outputs[0]
    return torch.cat(outputs).index_select(0, packing.bucketed_positions)
