"""Proof at start that packing changes nothing: two packed sequences score as each does alone.

An architecture or attention that lets packed sequences see each other, or a rank only its own shard, trains
without any error on wrong log-probabilities. So each start compares a packed pass with plain logits once.
"""

import torch
from torch import Tensor

from atropos_exp.errors import UserError
from atropos_exp.parts.trainer.packing import Packing, make_micro_batch, scoring_batch
from atropos_exp.parts.trainer.verl_backend import PackedBackend

LENGTHS = (7, 5)
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}  # mean over the tokens, nats; a leak shows as whole nats


def check_packing(backend: PackedBackend, device: torch.device) -> None:
    """Raise UserError unless a packed pass gives the log-probabilities of plain ones. Collective."""
    token_ids = torch.arange(1, sum(LENGTHS) + 1) * 7919 % backend.vocab_size  # anything, but not all the same
    batch = scoring_batch([ids.numpy() for ids in token_ids.split(LENGTHS)], temperature=1.0)
    micro = make_micro_batch(batch, range(len(LENGTHS)), device=device, sp_size=backend.sp_size)
    with backend.evaluating():
        packed_M, _ = backend.forward(micro, with_entropy=False)
        alone_M = torch.cat([_plain_logprobs(backend, ids.to(device)) for ids in token_ids.split(LENGTHS)])
    gap = float((packed_M - alone_M).abs().mean())
    if not gap <= TOLERANCE[backend.options.compute_dtype]:
        raise UserError(
            f"{type(backend.module).__name__} with model.attn_implementation={backend.options.attn_implementation} and "
            f"trainer.sequence_parallel_size={backend.sp_size} cannot train on packed sequences: their logprobs "
            f"differ by {gap:.3g} nats on average from those of each sequence alone. Choose "
            "model.attn_implementation=packed, trainer.sequence_parallel_size=1, or a model with standard attention."
        )


def _plain_logprobs(backend: PackedBackend, token_ids: Tensor) -> Tensor:
    """Logprobs [T - 1] of one sequence from its plain logits, the whole sequence on this rank."""
    with backend.without_sequence_parallelism():
        logits = backend.module(
            input_ids=token_ids[None],
            position_ids=torch.arange(len(token_ids), device=token_ids.device)[None],
            attention_mask=None,
            use_cache=False,
            packing=Packing(lengths=(len(token_ids),), device=token_ids.device, sp_size=1),
        ).logits[0]
    return torch.log_softmax(logits[:-1].float(), -1).gather(-1, token_ids[1:, None])[:, 0]
