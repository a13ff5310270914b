"""Proof at start that the layout changes nothing: two sequences together score as each does alone.

`exactness.py` has tried the architecture; this tries the loaded weights themselves, in their dtype, sharded, and with
sequence parallelism. An attention that lets a rank see only its own shard trains without any error on wrong numbers.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from atropos_exp.errors import UserError
from atropos_exp.parts.trainer.adapters import plain_name
from atropos_exp.parts.trainer.layouts import model_input
from atropos_exp.parts.trainer.packing import make_micro_batch, scoring_batch
from atropos_exp.parts.trainer.verl_backend import PackedBackend

LENGTHS = (70, 45)
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}  # mean over the tokens, nats; a leak shows as whole nats


def check_layout(backend: PackedBackend, device: torch.device) -> None:
    """Raise UserError unless one pass gives the logprobs of a plain pass for each sequence, and for weights that are
    not finite. Collective."""
    _check_finite(backend)
    token_ids = torch.arange(1, sum(LENGTHS) + 1) * 7919 % backend.vocab_size  # anything, but not all the same
    batch = scoring_batch([ids.numpy() for ids in token_ids.split(LENGTHS)], temperature=1.0)
    micro = make_micro_batch(batch, range(len(LENGTHS)), device=device, sp_size=backend.sp_size)
    with backend.evaluating():
        together_M, _ = backend.forward(micro, with_entropy=False)
        alone_M = torch.cat([_plain_logprobs(backend, ids.to(device)) for ids in token_ids.split(LENGTHS)])
    gap = float((together_M - alone_M).abs().mean())
    if not math.isfinite(gap):
        raise UserError(
            f"{type(backend.module).__name__} gives logprobs that are not finite, though its weights are: it overflows "
            f"in {backend.options.compute_dtype}. Choose another model.dtype, or another model"
        )
    if not gap <= TOLERANCE[backend.options.compute_dtype]:
        raise UserError(
            f"{type(backend.module).__name__} cannot be trained with {backend.options.layout} and "
            f"trainer.sequence_parallel_size={backend.sp_size}: the logprobs of sequences in one pass differ by "
            f"{gap:.3g} nats on average from those of each alone. Choose "
            "trainer.sequence_parallel_size=1 with trainer.layout=auto and model.attn_implementation=auto, or another "
            "model."
        )


def _check_finite(backend: PackedBackend) -> None:
    """Raise UserError on every rank if a weight has NaN or infinity in it, on whichever rank. Collective."""
    here = []
    for name, tensor in backend.module.named_parameters():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if local.is_floating_point() and not local.isfinite().all():
            here.append(plain_name(name))
    every: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(every, here)
    if names := list(dict.fromkeys(name for part in every for name in part)):
        raise UserError(
            f"the model holds NaN or infinity in {len(names)} of its weights, the first is {names[0]}: it was damaged, "
            "or its training diverged. Fetch it again, or take an earlier checkpoint"
        )


def _plain_logprobs(backend: PackedBackend, token_ids: Tensor) -> Tensor:
    """Logprobs [T - 1] of one sequence from its plain logits, the whole sequence on this rank."""
    with backend.without_sequence_parallelism():
        batch = scoring_batch([token_ids.cpu().numpy()], temperature=1.0)
        micro = make_micro_batch(batch, [0], device=token_ids.device)
        given = model_input(micro, backend.options.layout.kind)
        logits = backend.module(**given.arguments, use_cache=False).logits[0]
    return torch.log_softmax(logits[:-1].float(), -1).gather(-1, token_ids[1:, None])[:, 0]
