"""How the sequences of a micro-batch lie in a forward pass.

    packed  end to end in one row of S tokens, kept apart by the attention (`attention.py`) or by their positions
    rows    one sequence a row, padded on the right to the longest: what is causal cannot see the padding
    single  one sequence a forward pass

`packed` computes nothing in vain, but only attention can be told where a sequence begins: a convolution or a
recurrent state runs on into the next one. `exactness.py` finds out which of them are exact for a model.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from atropos_exp.parts.trainer.packing import Kind, MicroBatch, Packing


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How sequences lie, and transformers' name of the attention that keeps them apart."""

    kind: Kind
    attention: str

    def __str__(self) -> str:
        return f"trainer.layout={self.kind} and {self.attention} attention"


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelInput:
    """One forward pass of a whole micro-batch on one rank."""

    arguments: dict[str, Any]  # of the model's `forward`
    positions_M: Tensor  # int64, where the hidden state before each trained token lies among all hidden states


def model_input(micro: MicroBatch, kind: Kind) -> ModelInput:
    """The input of a forward pass over `micro`, laid out as `kind`. `single` is a micro-batch of one sequence."""
    before_M = micro.trained_M - 1
    if kind == "packed":
        return ModelInput(
            arguments={
                "input_ids": micro.token_ids_S[None],
                "position_ids": micro.position_ids_S[None],
                "attention_mask": None,
                "packing": micro.packing,
            },
            positions_M=before_M,
        )
    places_S, shape_NT = padded_places(micro.packing)
    token_ids_NT = micro.token_ids_S.new_zeros(shape_NT[0] * shape_NT[1]).index_copy(0, places_S, micro.token_ids_S)
    return ModelInput(arguments={"input_ids": token_ids_NT.view(shape_NT)}, positions_M=places_S[before_M])


def padded_places(packing: Packing) -> tuple[Tensor, tuple[int, int]]:
    """Where each packed token [S] lies among the N x T places of padded rows, and that shape."""
    lengths_N = torch.tensor(packing.lengths)
    rows_S = torch.repeat_interleave(torch.arange(len(lengths_N)), lengths_N)
    starts_N = lengths_N.cumsum(0) - lengths_N
    columns_S = torch.arange(len(rows_S)) - starts_N[rows_S]
    return (rows_S * packing.max_length + columns_S).to(packing.device), (len(lengths_N), packing.max_length)
