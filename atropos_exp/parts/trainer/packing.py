"""How sequences are packed end to end: which ones share a micro-batch, and how one micro-batch is laid out.

Shape suffixes beside those of `types.py`:
    M = trained tokens of a micro-batch, in packed order
    B = padded positions of all length buckets together
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from atropos_exp.errors import UserError
from atropos_exp.types import TokenIds, TrainBatch

Kind = Literal["packed", "rows", "single"]  # how sequences lie in a forward pass: see layouts.py


def split_balanced(lengths: Sequence[int], num_bins: int) -> list[list[int]]:
    """Indices of `lengths` in `num_bins` bins of about equal sums: the longest first, each into the emptiest bin."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    loads = [(0, number) for number in range(num_bins)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        load, number = loads[0]
        bins[number].append(index)
        heapq.heapreplace(loads, (load + lengths[index], number))
    return [sorted(indices) for indices in bins]


def plan_micro_batches(
    lengths: Sequence[int], *, dp_size: int, max_tokens: int, kind: Kind = "packed"
) -> list[list[list[int]]]:
    """Assign sequences to micro-batches: result[data-parallel rank][micro-batch] is a list of indices of `lengths`.

    No micro-batch holds more than `max_tokens`, padding of `rows` included; `single` has one sequence in each. All
    ranks get equally many, since each is a collective; some may be empty. Every rank computes the same plan, without
    communication. Raises UserError if a sequence is too long.
    """
    if max(lengths) > max_tokens:
        raise UserError(
            f"a sequence of {max(lengths)} tokens does not fit a micro-batch of {max_tokens} tokens. Raise "
            "trainer.max_tokens_per_micro_batch, or lower max_prompt_length or max_response_length."
        )
    ranks = split_balanced(lengths, dp_size)
    if kind != "packed":
        plan = [_by_length(lengths, rank, max_tokens if kind == "rows" else 0) for rank in ranks]
        most = max(len(micros) for micros in plan)
        return [micros + [[]] * (most - len(micros)) for micros in plan]
    num_micro = max(1, *(-(-sum(lengths[i] for i in rank) // max_tokens) for rank in ranks))
    while True:
        plan = [
            [[rank[i] for i in indices] for indices in split_balanced([lengths[i] for i in rank], num_micro)]
            for rank in ranks
        ]
        if all(sum(lengths[i] for i in micro) <= max_tokens for rank in plan for micro in rank):
            return plan
        num_micro += 1


def _by_length(lengths: Sequence[int], indices: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Neighbours in length together, as many as stay within `max_tokens` when all are as long as the longest."""
    micros: list[list[int]] = []
    for index in sorted(indices, key=lambda i: (-lengths[i], i)):
        if not micros or lengths[micros[-1][0]] * (len(micros[-1]) + 1) > max_tokens:
            micros.append([])
        micros[-1].append(index)
    return [sorted(micro) for micro in micros] or [[]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Packing:
    """Where the sequences of one forward pass lie. The model passes it on to `packed_attention`."""

    lengths: tuple[int, ...]  # of the sequences, the alignment padding as a last one
    device: torch.device
    sp_size: int  # ranks that share the sequence (Ulysses)

    @cached_property
    def starts(self) -> Tensor:
        """Offsets of the sequences and the total, int32 [N + 1], as variable-length kernels take them."""
        offsets = torch.tensor((0, *self.lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return offsets.to(self.device)

    @property
    def max_length(self) -> int:
        """The length of the longest sequence."""
        return max(self.lengths)

    @property
    def uniform(self) -> bool:
        """Whether all sequences have the same length."""
        return min(self.lengths) == max(self.lengths)

    @cached_property
    def _buckets(self) -> list[tuple[Tensor, Tensor]]:
        """The packed positions [n, T] of each length bucket, and which of them are valid [n, T]."""
        lengths = torch.tensor(self.lengths)
        starts = lengths.cumsum(0) - lengths
        classes = torch.tensor([(length - 1).bit_length() for length in self.lengths])
        found = []
        for size in classes.unique():
            members = (classes == size).nonzero()[:, 0]
            steps = torch.arange(int(lengths[members].max()))
            found.append((starts[members, None] + steps, steps < lengths[members, None]))
        return found

    @cached_property
    def buckets(self) -> list[tuple[int, int, Tensor]]:
        """Each length bucket as (number of sequences n, padded length T, source positions [n * T]).

        Lengths of one bucket differ by less than a factor of two, so less than half of it is padding. A padded
        position reads position 0, which causal attention never reaches from a valid position.
        """
        return [
            (*positions.shape, positions.masked_fill(~valid, 0).reshape(-1).to(self.device))
            for positions, valid in self._buckets
        ]

    @cached_property
    def bucketed_positions(self) -> Tensor:
        """The place [S] of each packed position in the concatenated buckets [B]."""
        places = torch.empty(sum(self.lengths), dtype=torch.int64)
        offset = 0
        for positions, valid in self._buckets:
            places[positions[valid]] = offset + torch.arange(valid.numel()).view_as(valid)[valid]
            offset += valid.numel()
        return places.to(self.device)


@dataclass(frozen=True, kw_only=True, eq=False)
class MicroBatch:
    """The input of one forward pass of one data-parallel rank, on its device."""

    token_ids_S: Tensor  # int64, padded so that the ranks of a sequence-parallel group share it evenly
    position_ids_S: Tensor  # int64, 0 where a sequence starts
    packing: Packing
    trained_M: Tensor  # int64 packed positions of the trained tokens; their logits are one position earlier
    rows_M: Tensor  # int64, sequence of each
    columns_M: Tensor  # int64, its number among the trained tokens of that sequence
    shape_NR: tuple[int, int]
    advantages_M: Tensor
    behaviour_M: Tensor
    has_behaviour_M: Tensor
    fresh_M: Tensor
    reference_M: Tensor
    has_reference_M: Tensor
    supervised_M: Tensor
    temperature: float | Tensor  # one for the whole batch, or [M] float32
    empty: bool  # a stand-in that only keeps the ranks in step: contributes nothing

    def rows(self, values_M: Tensor) -> Tensor:
        """`values_M` as [N, R]: one row per sequence, trained tokens left-aligned, 0 elsewhere. Differentiable."""
        num_rows, num_columns = self.shape_NR
        flat = values_M.new_zeros(num_rows * num_columns)
        return flat.index_copy(0, self.rows_M * num_columns + self.columns_M, values_M).view(self.shape_NR)

    def mask(self) -> Tensor:
        """Bool [N, R], True where `rows` holds a value."""
        return self.rows(torch.ones_like(self.rows_M, dtype=torch.bool))


def make_micro_batch(
    batch: TrainBatch, sequences: Sequence[int], *, device: torch.device, sp_size: int = 1
) -> MicroBatch:
    """Pack the sequences of `batch` with these indices, in this order, onto `device`. No Python runs per token."""
    if not sequences:
        return _stand_in(device, sp_size)
    chosen = torch.tensor(sequences)
    lengths_N = batch.lengths_N[chosen]
    total = int(lengths_N.sum())
    starts_N = lengths_N.cumsum(0) - lengths_N
    row_S = torch.repeat_interleave(torch.arange(len(chosen)), lengths_N, output_size=total)
    position_S = torch.arange(total) - starts_N[row_S]
    source_S = (batch.lengths_N.cumsum(0) - batch.lengths_N)[chosen][row_S] + position_S

    trained_M = batch.trained_S[source_S].nonzero()[:, 0]
    if not len(trained_M):
        return _stand_in(device, sp_size)
    if bool((position_S[trained_M] == 0).any()):
        raise ValueError("the first token of a sequence has no prediction, so it cannot be trained")
    row_M = row_S[trained_M]
    per_row_N = torch.bincount(row_M, minlength=len(chosen))
    column_M = torch.arange(len(trained_M)) - (per_row_N.cumsum(0) - per_row_N)[row_M]
    source_M = source_S[trained_M]

    padding = -total % sp_size
    token_ids_S, lengths = batch.token_ids_S[source_S], lengths_N.tolist()
    if padding:
        token_ids_S = torch.cat([token_ids_S, token_ids_S.new_zeros(padding)])
        position_S = torch.cat([position_S, torch.arange(padding)])
        lengths.append(padding)
    return MicroBatch(
        token_ids_S=token_ids_S.to(device, torch.int64),
        position_ids_S=position_S.to(device),
        packing=Packing(lengths=tuple(lengths), device=device, sp_size=sp_size),
        trained_M=trained_M.to(device),
        rows_M=row_M.to(device),
        columns_M=column_M.to(device),
        shape_NR=(len(chosen), int(per_row_N.max())),
        advantages_M=batch.advantages_S[source_M].to(device, torch.float32),
        behaviour_M=batch.behaviour_logprobs_S[source_M].to(device, torch.float32),
        has_behaviour_M=batch.has_behaviour_N[chosen][row_M].to(device),
        fresh_M=batch.fresh_N[chosen][row_M].to(device),
        reference_M=batch.reference_logprobs_S[source_M].to(device, torch.float32),
        has_reference_M=batch.has_reference_N[chosen][row_M].to(device),
        supervised_M=batch.supervised_N[chosen][row_M].to(device),
        temperature=_temperature(batch.temperature_N, chosen[row_M], device),
        empty=False,
    )


def scoring_batch(sequences: Sequence[TokenIds], temperature: float) -> TrainBatch:
    """A batch for scoring: every token but the first of each sequence counts as trained."""
    token_ids_S = torch.from_numpy(np.concatenate(sequences).astype(np.int64))
    lengths_N = torch.tensor([len(ids) for ids in sequences])
    scored_S = torch.ones(len(token_ids_S), dtype=torch.bool)
    scored_S[lengths_N.cumsum(0) - lengths_N] = False
    zeros_S, no_N = torch.zeros(len(token_ids_S)), torch.zeros(len(sequences), dtype=torch.bool)
    return TrainBatch(
        token_ids_S=token_ids_S,
        lengths_N=lengths_N,
        trained_S=scored_S,
        advantages_S=zeros_S,
        behaviour_logprobs_S=zeros_S,
        has_behaviour_N=no_N,
        fresh_N=no_N,
        reference_logprobs_S=zeros_S,
        has_reference_N=no_N,
        supervised_N=no_N,
        temperature_N=torch.full((len(sequences),), temperature),
        num_trained_tokens=int(scored_S.sum()),
    )


def _temperature(temperature_N: Tensor, sequence_M: Tensor, device: torch.device) -> float | Tensor:
    """One number if the whole batch has one temperature, so that dividing needs no tensor; else one per token. Decided
    on the whole batch, so that the result does not depend on how it was split."""
    first = float(temperature_N[0])
    return first if bool((temperature_N == first).all()) else temperature_N[sequence_M].to(device, torch.float32)


def _stand_in(device: torch.device, sp_size: int) -> MicroBatch:
    batch = scoring_batch([np.zeros(max(2, sp_size), dtype=np.int32)], temperature=1.0)
    return replace(make_micro_batch(batch, [0], device=device, sp_size=sp_size), empty=True)
